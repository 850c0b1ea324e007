#include "memory.h"

#include <sys/mman.h>

#include "parallel.h"

namespace sea {

Tensor make(std::vector<int64_t> sizes, ScalarType type) {
  return allocate(count_bytes(sizes, type), [&] { return torch::stable::empty(sizes, type); });
}

Tensor make_gradient(const Tensor& like) {
  const std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  Tensor out = is_dense(like)
                   ? allocate(count_bytes(sizes, like.scalar_type()), [&] { return torch::stable::empty_like(like); })
                   : make(sizes, like.scalar_type());
#ifdef MADV_HUGEPAGE
  // The operating system clears fresh memory of this size page by page, which costs as much as computing the values. So
  // ask for large pages, and touch each once here, since two threads that meet at a fresh page both clear it. If there
  // are no large pages, nothing is lost.
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data_ptr()), end = begin + out.numel() * out.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0)
    parallel((last - first) / kPage,
             [&](int64_t page) { *reinterpret_cast<volatile char*>(first + page * kPage) = 0; });
#endif
  return out;
}

}  // namespace sea
