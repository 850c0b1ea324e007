// All vector loops, for the instruction set that SEA_ISA names.
#include "backward.h"
#include "distance.h"
#include "pool.h"

namespace sea {
namespace SEA_ISA {

template <class T>
constexpr Loops<T> kLoops = {pool_blocks<T>, pool<T>,    spread<T>,   prepare<T>, directions<T>,
                             distance<T>,    project<T>, backward<T>, cosine<T>,  cosine_backward<T>};

extern const Loops<float> loops_float = kLoops<float>;
extern const Loops<double> loops_double = kLoops<double>;

}  // namespace SEA_ISA
}  // namespace sea
