// A batch from the host: one copy to the device, and the plan from there.
#pragma once

#include "common/params.h"

namespace lora_ext {

struct UpdateParams {
  PlanParams plan;   // from what `staging` holds once it is copied
  const void* host;  // pinned, unchanged until the copy is done
  void* staging;
  int64_t bytes;
  void* stream;
};

namespace cuda {

int update_plan(const UpdateParams& params);

}  // namespace cuda
}  // namespace lora_ext
