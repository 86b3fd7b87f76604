# What the library was built for; the module itself is written by the build.
VERSION: str
TORCH_TARGET: str
TORCH_HEADERS: str
CUDA_VERSION: str
CUDA_ARCHITECTURES: str
PLATFORM: str
COMPILER: str
