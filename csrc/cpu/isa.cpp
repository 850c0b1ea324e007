// All vectorized kernels, for the instruction set that SEA_ISA names.
#include "anchors.h"
#include "backward.h"
#include "cosine.h"
#include "distance.h"
#include "pool.h"

namespace sea {
namespace SEA_ISA {

template <class T>
constexpr Kernels<T> kKernels = {pool_blocks<T>, pool<T>,     prepare<T>, directions<T>,     project<T>,
                                 distance<T>,    backward<T>, cosine<T>,  cosine_backward<T>};

extern const Kernels<float> kernels_float = kKernels<float>;
extern const Kernels<double> kernels_double = kKernels<double>;

}  // namespace SEA_ISA
}  // namespace sea
