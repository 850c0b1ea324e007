#include "memory.h"

#include <sys/mman.h>

#include "parallel.h"

namespace sea {

Tensor make_gradient(const Tensor& like) {
  const std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  Tensor out = is_dense(like)
                   ? allocate(count_bytes(sizes, like.scalar_type()), [&] { return torch::stable::empty_like(like); })
                   : make(sizes, like.scalar_type());
#ifdef MADV_HUGEPAGE
  // Fresh memory of this size comes page by page from the kernel, which costs as much as computing what is written to
  // it: ask for large pages, and touch each once here, since two threads that meet at a fresh page both clear it. Where
  // the kernel has none to give nothing is lost.
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
