// Functions that host and device share.
#pragma once

#ifdef __CUDACC__
#define LORA_EXT_HOST_DEVICE __host__ __device__
#else
#define LORA_EXT_HOST_DEVICE
#endif
