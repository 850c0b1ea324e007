// AddressSanitizer's functions; without it they do nothing.
#pragma once
#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

namespace emulator {
inline constexpr bool kAddressSanitizer = true;
}
#else
namespace emulator {
inline constexpr bool kAddressSanitizer = false;
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_poison_memory_region(const volatile void*, size_t) {}
inline void __asan_unpoison_memory_region(const volatile void*, size_t) {}
inline void* __asan_region_is_poisoned(void*, size_t) { return nullptr; }
}  // namespace emulator
#endif
