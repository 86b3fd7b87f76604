// The bodies of the microkernels for one instruction set: LORA_EXT_ISA names its namespace,
// LORA_EXT_VECTOR_BYTES its vectors. No function of a shared header is called in here (see the
// files that include this one).

namespace lora_ext::cpu::LORA_EXT_ISA {

#include "cpu/vector.inl"

// ---- dot: each (token, row) pair has one vector accumulator of its own, whatever the block it is
// computed in, so its bits do not depend on how many tokens or rows come with it.

template <int kTokens, int kRows, class T>
inline void dot_block(const DotParams& p, int64_t token, int64_t row) {
  using Vector = typename Accumulation<T>::Vector;
  using Scalar = typename Accumulation<T>::Scalar;
  const T* x[kTokens];
  const T* a[kRows];
  for (int i = 0; i < kTokens; ++i) x[i] = static_cast<const T*>(p.x[token + i]);
  for (int j = 0; j < kRows; ++j) a[j] = static_cast<const T*>(p.a) + (row + j) * p.a_stride;

  Vector acc[kTokens][kRows] = {};
  const auto add = [&](auto load_at) {
    Vector rows[kRows];
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) rows[j] = load_at(a[j]);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      const Vector values = load_at(x[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) acc[i][j] += values * rows[j];
    }
  };
  int64_t k = 0;
  for (; k + kLanes<Vector> <= p.k; k += kLanes<Vector>)
    add([k](const T* from) { return load(from + k); });
  if (k < p.k) add([k, rest = p.k - k](const T* from) { return load_partial(from + k, rest); });

  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kRows; ++j) {
      static_cast<Scalar*>(p.out[token + i])[row + j] =
          static_cast<Scalar>(p.scaling) * sum(acc[i][j]);
    }
  }
}

template <int kRows, class T>
inline void dot_rows(const DotParams& p, int64_t row) {
  int64_t token = 0;
  // Four by four accumulators and their operands fit the 32 registers of AVX-512 alone.
  if constexpr (kVectorBytes == 64) {
    for (; token + 4 <= p.num_tokens; token += 4) dot_block<4, kRows, T>(p, token, row);
  }
  for (; token + 2 <= p.num_tokens; token += 2) dot_block<2, kRows, T>(p, token, row);
  if (token < p.num_tokens) dot_block<1, kRows, T>(p, token, row);
}

template <class T>
void dot(const DotParams& p) {
  int64_t row = 0;
  for (; row + 4 <= p.num_rows; row += 4) dot_rows<4, T>(p, row);
  for (; row < p.num_rows; ++row) dot_rows<1, T>(p, row);
}

// ---- gather

template <class T>
void gather(const GatherParams& p) {
  using Vector = typename Accumulation<T>::Vector;
  using Scalar = typename Accumulation<T>::Scalar;
  constexpr int kWidth = kLanes<Vector>;
  for (int64_t first = 0; first < p.count; first += kWidth) {
    const int64_t n = p.count - first < kWidth ? p.count - first : kWidth;
    T from[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) from[i] = static_cast<const T*>(p.from)[(first + i) * p.stride];
    const Vector scaled = static_cast<Scalar>(p.scaling) * load(from);
    for (int64_t i = 0; i < n; ++i) static_cast<Scalar*>(p.out)[first + i] = scaled[i];
  }
}

// ---- pack

template <class T>
void pack(const PackParams& p) {
  using Vector = typename Accumulation<T>::Vector;
  using Scalar = typename Accumulation<T>::Scalar;
  constexpr int kWidth = kLanes<Vector>;
  const T* b[kWidth];
  for (int n = 0; n < kWidth; ++n) {
    // Lanes past the last row are dropped by accumulate: any row that exists will do.
    b[n] = static_cast<const T*>(p.b) + (n < p.num_rows ? n : p.num_rows - 1) * p.b_stride;
  }
  Scalar* const panel = static_cast<Scalar*>(p.panel);
  Vector block[kWidth];
  if (p.rank < kWidth) {
#pragma GCC unroll 16
    for (int n = 0; n < kWidth; ++n) block[n] = load_partial(b[n], p.rank);
    transpose(block);
    // All of them, though only `rank` are read: a loop of unknown length would keep the block in
    // memory instead of registers.
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) store(panel + j * kWidth, block[j]);
    return;
  }
  for (int64_t j = 0; j < p.rank; j += kWidth) {
    // The last block ends where the row does: it overlaps the one before rather than read past the
    // rank.
    const int64_t first = j + kWidth <= p.rank ? j : p.rank - kWidth;
#pragma GCC unroll 16
    for (int n = 0; n < kWidth; ++n) block[n] = load(b[n] + first);
    transpose(block);
#pragma GCC unroll 16
    for (int n = 0; n < kWidth; ++n) store(panel + (first + n) * kWidth, block[n]);
  }
}

// ---- accumulate: one accumulator per (token, vector of columns), summed over the rank in
// ascending order.

// fp64 to a half with one rounding: fp32 as a stop on the way, rounded to odd, keeps what decides
// the second rounding.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const uint32_t bits = bit_cast<uint32_t>(nearest);
  if (static_cast<double>(nearest) == value || value != value || (bits & 1) != 0) return nearest;
  const bool towards_zero = (static_cast<double>(nearest) < value) == (value < 0);
  return bit_cast<float>(towards_zero ? bits - 1 : bits + 1);
}

template <class Half>
inline void add_one(Half* y, double delta) {
  HalfBits h = {y->bits};
  const double old = static_cast<double>(widen(Half{}, h)[0]);
  h = narrow(Half{}, Floats{} + round_to_odd(old + delta));
  y->bits = h[0];
}
inline void add_one(float* y, double delta) {
  *y = static_cast<float>(static_cast<double>(*y) + delta);
}
inline void add_one(double* y, double delta) { *y += delta; }

template <class Y, class Vector>
inline void add_to(Y* y, const Vector& delta, int64_t num_columns) {
  if constexpr ((sizeof(Y) == 8) != (sizeof(delta[0]) == 8)) {
    for (int64_t n = 0; n < num_columns; ++n) add_one(y + n, static_cast<double>(delta[n]));
  } else if (num_columns == kLanes<Vector>) {
    store(y, load(y) + delta);
  } else {
    // Through a copy of full width: the same instructions, hence the same bits, as in the middle of
    // the row.
    Y copy[kLanes<Vector>] = {};
    for (int64_t n = 0; n < num_columns; ++n) copy[n] = y[n];
    store(copy, load(copy) + delta);
    for (int64_t n = 0; n < num_columns; ++n) y[n] = copy[n];
  }
}

template <int kTokens, class Scalar, class Y>
inline void accumulate_block(const AccumulateParams& p, int64_t token) {
  using Vector = typename Accumulation<Scalar>::Vector;
  const Scalar* const panel = static_cast<const Scalar*>(p.panel);
  const Scalar* xa[kTokens];
  for (int i = 0; i < kTokens; ++i) xa[i] = static_cast<const Scalar*>(p.xa[token + i]);
  Vector acc[kTokens] = {};
  for (int64_t j = 0; j < p.rank; ++j) {
    const Vector column = load(panel + j * kLanes<Vector>);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) acc[i] += xa[i][j] * column;
  }
  for (int i = 0; i < kTokens; ++i) add_to(static_cast<Y*>(p.y[token + i]), acc[i], p.num_columns);
}

template <class Scalar, class Y>
void accumulate(const AccumulateParams& p) {
  int64_t token = 0;
  for (; token + 8 <= p.num_tokens; token += 8) accumulate_block<8, Scalar, Y>(p, token);
  if (token + 4 <= p.num_tokens) accumulate_block<4, Scalar, Y>(p, token), token += 4;
  if (token + 2 <= p.num_tokens) accumulate_block<2, Scalar, Y>(p, token), token += 2;
  if (token < p.num_tokens) accumulate_block<1, Scalar, Y>(p, token);
}

// ---- widen and narrow

template <class Scalar, class T>
void widen(const WidenParams& p) {
  using Vector = typename Accumulation<T>::Vector;
  constexpr int kWidth = kLanes<Vector>;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const T* const from = static_cast<const T*>(p.from[i]) + p.first;
    Scalar* const to = static_cast<Scalar*>(p.to) + i * p.to_stride;
    for (int64_t n = 0; n < p.count; n += kWidth) {
      const int64_t rest = p.count - n;
      const Vector values = rest < kWidth ? load_partial(from + n, rest) : load(from + n);
      if constexpr (sizeof(values[0]) == sizeof(Scalar)) {
        if (rest >= kWidth) {
          store(to + n, values);
          continue;
        }
      }
      for (int64_t lane = 0; lane < kWidth && lane < rest; ++lane) {
        to[n + lane] = static_cast<Scalar>(values[lane]);
      }
    }
  }
}

template <class T>
void narrow_row(const NarrowParams& p) {
  using Vector = typename Accumulation<T>::Vector;
  using Scalar = typename Accumulation<T>::Scalar;
  constexpr int kWidth = kLanes<Vector>;
  const Scalar* const from = static_cast<const Scalar*>(p.from);
  T* const to = static_cast<T*>(p.to);
  int64_t n = 0;
  for (; n + kWidth <= p.count; n += kWidth) store(to + n, load(from + n));
  if (n < p.count) {
    T rest[kWidth];
    store(rest, load_partial(from + n, p.count - n));
    for (int64_t lane = 0; n + lane < p.count; ++lane) to[n + lane] = rest[lane];
  }
}

// In the order of DType.
constexpr Microkernels table(const char* name) {
  return Microkernels{
      name,
      kVectorBytes,
      {dot<float>, dot<Float16>, dot<BFloat16>, dot<double>},
      {gather<float>, gather<Float16>, gather<BFloat16>, gather<double>},
      {pack<float>, pack<Float16>, pack<BFloat16>, pack<double>},
      {{accumulate<float, float>, accumulate<float, Float16>, accumulate<float, BFloat16>,
        accumulate<float, double>},
       {accumulate<double, float>, accumulate<double, Float16>, accumulate<double, BFloat16>,
        accumulate<double, double>}},
      {{widen<float, float>, widen<float, Float16>, widen<float, BFloat16>, widen<float, double>},
       {widen<double, float>, widen<double, Float16>, widen<double, BFloat16>,
        widen<double, double>}},
      {narrow_row<float>, narrow_row<Float16>, narrow_row<BFloat16>, narrow_row<double>},
  };
}

}  // namespace lora_ext::cpu::LORA_EXT_ISA
