// Vectors of one instruction set: loads that convert to the accumulation type, stores that round,
// transposition. Included by microkernels.inl inside the namespace of that instruction set. GCC's
// vector extensions, so that the same text serves every width; intrinsics only where the extensions
// have nothing. What the set has is told by LORA_EXT_VECTOR_BYTES (64: AVX-512, 32: AVX2 with
// F16C): before GCC 13, C++ does not see a target pragma's macros.

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kVectorBytes = LORA_EXT_VECTOR_BYTES;
using Floats = float __attribute__((vector_size(kVectorBytes)));
using Doubles = double __attribute__((vector_size(kVectorBytes)));
using Ints = int32_t __attribute__((vector_size(kVectorBytes)));
using Longs = int64_t __attribute__((vector_size(kVectorBytes)));
using Bits = uint32_t __attribute__((vector_size(kVectorBytes)));
using HalfBits = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

// The accumulation type of an element type, and its vector.
template <class T>
struct Accumulation {
  using Scalar = float;
  using Vector = Floats;
};
template <>
struct Accumulation<double> {
  using Scalar = double;
  using Vector = Doubles;
};
template <class Vector>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Vector{}[0]));

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline Bits select(Bits mask, Bits yes, Bits no) { return (mask & yes) | (~mask & no); }

// ---- halves to fp32, exactly

inline Floats widen(BFloat16, HalfBits h) {
  return bit_cast<Floats>(__builtin_convertvector(h, Bits) << 16);
}

inline Floats widen(Float16, HalfBits h) {
#if LORA_EXT_VECTOR_BYTES == 64
  // In the form with a mask, here and below, because GCC 12 warns inside its own form without one.
  return bit_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(h)));
#elif LORA_EXT_VECTOR_BYTES == 32
  return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  // The fields shifted into place, and the exponent's bias corrected by a multiplication, which
  // also normalises subnormal numbers; infinities and NaN need their exponent set by hand.
  const Bits bits = __builtin_convertvector(h, Bits);
  const Bits magnitude = (bits & 0x7fff) << 13;
  const Floats value = bit_cast<Floats>(magnitude) * 0x1p112f;
  const Bits special = bit_cast<Bits>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return bit_cast<Floats>(bit_cast<Bits>(value) | special | ((bits & 0x8000) << 16));
#endif
}

// ---- fp32 to halves, to nearest even

inline HalfBits narrow(BFloat16, Floats value) {
  const Bits bits = bit_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits is_nan = bit_cast<Bits>(value != value);
  return __builtin_convertvector(select(is_nan, (bits >> 16) | 0x40u, rounded), HalfBits);
}

inline HalfBits narrow(Float16, Floats value) {
#if LORA_EXT_VECTOR_BYTES == 64
  return bit_cast<HalfBits>(
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif LORA_EXT_VECTOR_BYTES == 32
  return bit_cast<HalfBits>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits bits = bit_cast<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  // Normal results: move the bias and round in integers. A carry into the exponent is right, up to
  // infinity.
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lets the hardware round at the last place of fp16's subnormals.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits is_small = bit_cast<Bits>(magnitude < (113u << 23));
  const Bits is_large = bit_cast<Bits>(magnitude >= (143u << 23));
  const Bits is_nan = bit_cast<Bits>(magnitude > 0x7f800000u);
  Bits result = select(is_small, subnormal, normal);
  result = select(is_large, Bits{} + 0x7c00u, result);
  result = select(is_nan, Bits{} + 0x7e00u, result);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), HalfBits);
#endif
}

// ---- loads and stores at any alignment

inline Floats load(const float* from) {
  Floats v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
inline Doubles load(const double* from) {
  Doubles v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <class Half>
inline Floats load(const Half* from) {
  HalfBits h;
  __builtin_memcpy(&h, from, sizeof(h));
  return widen(Half{}, h);
}

// The first n elements, zeros behind them; n is less than a vector's.
#if LORA_EXT_VECTOR_BYTES == 64
inline Floats load_partial(const float* from, int64_t n) {
  return bit_cast<Floats>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from));
}
inline Doubles load_partial(const double* from, int64_t n) {
  return bit_cast<Doubles>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), from));
}
template <class Half>
inline Floats load_partial(const Half* from, int64_t n) {
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  return widen(Half{}, bit_cast<HalfBits>(_mm256_maskz_loadu_epi16(mask, from)));
}
#else
// Without masked loads: a copy, by powers of two because its length is known only at run time,
// which is several times faster than a call.
template <class T>
inline auto load_partial(const T* from, int64_t n) {
  constexpr int kCount = kLanes<typename Accumulation<T>::Vector>;
  T padded[kCount] = {};
  T* to = padded;
#pragma GCC unroll 4
  for (int part = kCount / 2; part > 0; part /= 2) {
    if ((n & part) == 0) continue;
    __builtin_memcpy(to, from, part * sizeof(T));
    to += part;
    from += part;
  }
  return load(padded);
}
#endif

inline void store(float* to, Floats v) { __builtin_memcpy(to, &v, sizeof(v)); }
inline void store(double* to, Doubles v) { __builtin_memcpy(to, &v, sizeof(v)); }
template <class Half>
inline void store(Half* to, Floats v) {
  const HalfBits h = narrow(Half{}, v);
  __builtin_memcpy(to, &h, sizeof(h));
}

// ---- across lanes

// Halves added to each other until one element is left: a fixed order.
template <class Vector>
inline auto sum(const Vector& v) {
  auto parts = v;
#pragma GCC unroll 4
  for (int width = kLanes<Vector> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

#ifdef __clang__
#define LORA_EXT_SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LORA_EXT_SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
inline Floats interleave_low(Floats a, Floats b) {
  return LORA_EXT_SHUFFLE(Ints, a, b, LORA_EXT_LOW_32);
}
inline Floats interleave_high(Floats a, Floats b) {
  return LORA_EXT_SHUFFLE(Ints, a, b, LORA_EXT_HIGH_32);
}
inline Doubles interleave_low(Doubles a, Doubles b) {
  return LORA_EXT_SHUFFLE(Longs, a, b, LORA_EXT_LOW_64);
}
inline Doubles interleave_high(Doubles a, Doubles b) {
  return LORA_EXT_SHUFFLE(Longs, a, b, LORA_EXT_HIGH_64);
}

// Transposes a square block in registers. Interleaving row i with row i + half rotates the bits of
// (row, lane) by one place; after log2(lanes) rounds row and lane have changed places.
template <class Vector>
inline void transpose(Vector (&rows)[kLanes<Vector>]) {
  constexpr int kHalf = kLanes<Vector> / 2;
#pragma GCC unroll 4
  for (int round = 1; round < kLanes<Vector>; round *= 2) {
    Vector next[kLanes<Vector>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kHalf]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<Vector>; ++i) rows[i] = next[i];
  }
}
