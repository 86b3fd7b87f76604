// Threads: torch's pool behind one function, so that the kernels stay free of torch.
#pragma once

#include <atomic>
#include <cstdint>

namespace lora_ext::cpu {

// Runs task(context) on up to as many threads as torch.set_num_threads allows, and waits for all of
// them.
void run_on_threads(void (*task)(void* context), void* context);

// f(item) for every item in [0, count). Threads take the next item from a counter, so unequal items
// balance; they must write disjoint memory. `work` is the number of multiply-adds behind all items:
// below a few microseconds' worth, waking a thread costs more than it saves.
template <class F>
void parallel_for(int64_t count, int64_t work, const F& f) {
  constexpr int64_t kSerialWork = 1 << 16;
  if (count <= 1 || work < kSerialWork) {
    for (int64_t item = 0; item < count; ++item) f(item);
    return;
  }
  struct Context {
    const F& f;
    int64_t count;
    std::atomic<int64_t> next{0};
  } context{f, count};
  run_on_threads(
      [](void* opaque) {
        auto& shared = *static_cast<Context*>(opaque);
        for (int64_t item;
             (item = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) {
          shared.f(item);
        }
      },
      &context);
}

}  // namespace lora_ext::cpu
