// y = S x + B (A x) + b, and S unpacked, on a CPU, with S as it is stored: the kept values in order
// and one bit an entry, lowest first.
//
// Few tokens take the time of reading the matrix, so everything is read once and as it lies.  A row
// of S is 32 entries at a time: their bits say where the next values go, one instruction puts them
// there (AVX-512's expand; on AVX2 a shuffle by a table of 256 rows, 8 at a time), and they are
// multiplied with x in registers.  Where there are tiles (AMX), several tokens in bfloat16 take 16
// rows at a time, unpacked into the cache while those before are multiplied; many tokens take panels
// of up to 128 rows, which stay in the cache while the tokens pass by.  Sums are in float32.  Threads
// share rows: first those of A, then, behind a barrier, those of S and B.
//
// Plain C++17 with no header but the compiler's; the instruction set is chosen when it runs.
// Compiled and called by native.py.  Book: chapter 17.

#include "codes.h"

#include <cmath>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#define UNROLLED _Pragma("GCC unroll 16")
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define WITH_512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt"
#define AVX512 __attribute__((target(WITH_512)))
#define AMX __attribute__((target(WITH_512 ",amx-tile,amx-bf16")))
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bits and values are read as little-endian words"
#endif

namespace {

enum Kind { BF16, F16, F32 };
enum Set { PORTABLE, WITH_AVX2, WITH_AVX512, WITH_AMX };
enum Matrix { PLAIN, SPARSE, SWIFT };  // all entries there; S; S where a row is read without care
constexpr int SLABS[] = {1, 2, 4, 8, 16};  // tokens that are multiplied at once
constexpr int64_t PAD = 64;                // columns to which x is padded with zeros
constexpr int64_t APART = 32;              // more, so that not all tokens share sets of the cache
constexpr int64_t FEW = 4;                 // tokens up to which rows are faster than tiles
constexpr int64_t MANY = 512;              // tokens that pass by a panel at once
constexpr int64_t AHEAD = 2048;            // bytes of values asked for before they are needed
constexpr int64_t SHARE = 1 << 16;         // entries below which a thread is not worth waking

// One row of a matrix: of S, with its bits from bit `at` on; or of A or B, with none.
struct Row {
  const char *values, *end;  // of the whole matrix: nothing behind it is read
  const uint8_t* bits;
  int64_t bytes, at;  // of all bits
  int64_t n;
};

// Eight bytes from `byte` on, those behind the last as zeros.
inline uint64_t word(const Row& row, int64_t byte) {
  uint64_t found = 0;
  if (byte + 8 <= row.bytes)
    std::memcpy(&found, row.bits + byte, 8);
  else
    for (int i = 0; byte + i < row.bytes; i++) found |= uint64_t(row.bits[byte + i]) << 8 * i;
  return found;
}

// The row's 32 bits from `column` on; those past its end are cleared.
inline uint32_t next(const Row& row, int64_t column) {
  const int64_t at = row.at + column, left = row.n - column;
  const uint32_t bits = uint32_t(word(row, at >> 3) >> (at & 7));
  return left >= 32 ? bits : left > 0 ? bits & ((1u << left) - 1) : 0;
}

// The lowest `count` bits.
inline uint32_t first(int64_t count) {
  return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0;
}

// The bits of the next 32 columns: all; of S; of S where rows begin with a byte and have whole words.
template <int M>
inline uint32_t bits_at(const Row& row, int64_t column) {
  if (M == PLAIN) return first(row.n - column);
  if (M == SPARSE) return next(row, column);
  uint32_t bits;
  std::memcpy(&bits, row.bits + (row.at + column) / 8, 4);
  return bits;
}

// Can a row be read without care?  Then no load of 64 bytes reaches behind the last value.
inline bool swift(const Row& row, int64_t size) {
  return row.n % 64 == 0 && row.at % 8 == 0 && row.end - row.values >= size * row.n + 64;
}

inline float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float wide(const char* from, int64_t i, Kind kind) {
  if (kind == F32) {
    float value;
    std::memcpy(&value, from + 4 * i, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from + 2 * i, 2);
  if (kind == BF16) return of_bits(uint32_t(half) << 16);
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // Inf, NaN
  const float size = rest * 0x1p-24f;
  const float normal = of_bits((rest << 13) + (112u << 23));
  return of_bits(sign | bits_of(rest < 0x400 ? size : normal));
}

inline uint16_t bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, halves to even
}

inline uint16_t float16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (value != value) return uint16_t(sign | 0x7e00);
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (size < 0x1p-14f) return uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)));
  const uint32_t rest = (bits & 0x7fffffff) - (112u << 23);
  return uint16_t(sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline void narrow(float value, char* to, int64_t i, Kind kind) {
  if (kind == F32) {
    std::memcpy(to + 4 * i, &value, 4);
    return;
  }
  const uint16_t half = kind == BF16 ? bfloat16(value) : float16(value);
  std::memcpy(to + 2 * i, &half, 2);
}

// A row times T tokens: sums[t] += Σ row[c] x[t, c].  x is (T, width), zero from column n on, in
// bfloat16 for bfloat16 on AVX-512, else in float32; (width, T) for the portable one, whose compiler
// then takes the tokens together.
using Times = void (*)(const Row&, const void* x, int64_t width, float* sums);
// A row of S, unpacked: n values of 2 or 4 bytes.  Returns where the values after it begin.
using Spread = const char* (*)(const Row&, char* out);

template <int K, int T, int M>
void times_portable(const Row& row, const void* x, int64_t, float* sums) {
  constexpr int size = K == F32 ? 4 : 2;
  const float* in = static_cast<const float*>(x);
  const char* values = row.values;
  float total[T] = {};
  for (int64_t c = 0; c < row.n; c += 32) {
    uint32_t bits = bits_at<M>(row, c);
    for (; bits; bits &= bits - 1, values += size) {
      const float value = wide(values, 0, Kind(K));
      const float* mine = in + (c + __builtin_ctz(bits)) * T;
      for (int t = 0; t < T; t++) total[t] += value * mine[t];
    }
  }
  for (int t = 0; t < T; t++) sums[t] += total[t];
}

template <int SIZE, int M>
const char* spread_portable(const Row& row, char* out) {
  const char* values = row.values;
  std::memset(out, 0, row.n * SIZE);
  for (int64_t c = 0; c < row.n; c += 32)
    for (uint32_t bits = bits_at<M>(row, c); bits; bits &= bits - 1, values += SIZE)
      std::memcpy(out + (c + __builtin_ctz(bits)) * SIZE, values, SIZE);
  return values;
}

int64_t kept_portable(const Row& row) {
  int64_t kept = 0;
  for (int64_t c = 0; c < row.n; c += 32) kept += __builtin_popcount(next(row, c));
  return kept;
}

#if defined(__x86_64__)

// The next values of 16 bits, at least `kept` of them.
template <int M>
AVX512 inline __m512i halves512(const char* values, const char* end, int kept) {
  return M == SWIFT || values + 64 <= end ? _mm512_loadu_si512(values)
                                          : _mm512_maskz_loadu_epi16(first(kept), values);
}

template <int K, int T, int M>
AVX512 void times_avx512(const Row& row, const void* x, int64_t width, float* sums) {
  constexpr int size = K == F32 ? 4 : 2, SUMS = T < 4 ? 2 : 1;  // enough to hide the latency
  const char* values = row.values;
  __m512 total[SUMS][T];
  for (int i = 0; i < SUMS * T; i++) total[i / T][i % T] = _mm512_setzero_ps();
  for (int64_t c = 0; c < row.n; c += 32 * SUMS) {
    UNROLLED
    for (int i = 0; i < SUMS; i++) {
      const int64_t at = c + 32 * i;
      if (M != PLAIN && (K == F32 || !i)) _mm_prefetch(values + AHEAD, _MM_HINT_T0);
      const uint32_t bits = bits_at<M>(row, at);
      const int kept = __builtin_popcount(bits);
      if constexpr (K == F32) {
        UNROLLED
        for (int half = 0; half < 2; half++) {
          const __mmask16 mine = __mmask16(bits >> 16 * half);
          const int some = __builtin_popcount(mine);
          __m512 w = _mm512_maskz_loadu_ps(__mmask16(first(some)), values);
          if (SPARSE) w = _mm512_maskz_expand_ps(mine, w);
          const float* in = static_cast<const float*>(x) + at + 16 * half;
          UNROLLED
          for (int t = 0; t < T; t++)
            total[i][t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(in + t * width), total[i][t]);
          values += size * some;
        }
        continue;
      }
      __m512i w = halves512<M>(values, row.end, kept);
      w = M == PLAIN ? _mm512_maskz_mov_epi16(bits, w) : _mm512_maskz_expand_epi16(bits, w);
      values += size * kept;
      if constexpr (K == BF16) {
        const uint16_t* in = static_cast<const uint16_t*>(x) + at;
        UNROLLED
        for (int t = 0; t < T; t++)
          total[i][t] = _mm512_dpbf16_ps(
              total[i][t], (__m512bh)w, (__m512bh)_mm512_loadu_si512(in + t * width));
      } else {
        const float* in = static_cast<const float*>(x) + at;
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(w));
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1));
        UNROLLED
        for (int t = 0; t < T; t++) {
          const float* mine = in + t * width;
          total[i][t] = _mm512_fmadd_ps(low, _mm512_loadu_ps(mine), total[i][t]);
          total[i][t] = _mm512_fmadd_ps(high, _mm512_loadu_ps(mine + 16), total[i][t]);
        }
      }
    }
  }
  UNROLLED
  for (int t = 0; t < T; t++)
    for (int i = 0; i < SUMS; i++) sums[t] += _mm512_reduce_add_ps(total[i][t]);
}

template <int SIZE, int M>
AVX512 const char* spread_avx512(const Row& row, char* out) {
  const char* values = row.values;
  for (int64_t c = 0; c < row.n; c += 32) {
    const uint32_t bits = bits_at<M>(row, c), inside = first(row.n - c);
    const int kept = __builtin_popcount(bits);
    _mm_prefetch(values + AHEAD, _MM_HINT_T0);
    if constexpr (SIZE == 2) {
      const __m512i w = _mm512_maskz_expand_epi16(bits, halves512<M>(values, row.end, kept));
      if (M == SWIFT)
        _mm512_storeu_si512(out + 2 * c, w);
      else
        _mm512_mask_storeu_epi16(out + 2 * c, inside, w);
    } else {
      const char* from = values;
      UNROLLED
      for (int half = 0; half < 2; half++) {
        const __mmask16 mine = __mmask16(bits >> 16 * half);
        const int some = __builtin_popcount(mine);
        const __m512i w = M == SWIFT ? _mm512_loadu_si512(from)
                                     : _mm512_maskz_loadu_epi32(__mmask16(first(some)), from);
        const __m512i all = _mm512_maskz_expand_epi32(mine, w);
        char* const to = out + 4 * (c + 16 * half);
        if (M == SWIFT)
          _mm512_storeu_si512(to, all);
        else
          _mm512_mask_storeu_epi32(to, __mmask16(inside >> 16 * half), all);
        from += 4 * some;
      }
    }
    values += SIZE * kept;
  }
  return values;
}

// Tiles of 16 rows by 64 bytes; one setting does for all.
struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  Tiles() {
    for (int i = 0; i < 8; i++) bytes[i] = 64, rows[i] = 16;
  }
};
const Tiles TILES;

// A product of 16 rows, `stride` bytes apart, with 16 tokens, 32 columns a step; x in pairs of
// columns, (columns / 2, 16, 2).  The sums are in tile 0.
struct Product {
  const char* rows;
  int64_t stride;
  const char* x;
  int64_t step, steps;
};

AMX inline void step_on(Product& product) {
  _tile_loadd(1, product.rows + 64 * product.step, product.stride);
  _tile_loadd(2, product.x + 1024 * product.step, 64);
  _tile_dpbf16ps(0, 1, 2);
  product.step++;
}

// The rest of a product; sums[i][t] += it.
AMX void finish(Product& product, float (*sums)[16]) {
  alignas(64) float found[16][16];
  while (product.step < product.steps) step_on(product);
  _tile_stored(0, found, 64);
  _tile_zero(0);
  for (int i = 0; i < 16; i++)
    for (int t = 0; t < 16; t++) sums[i][t] += found[i][t];
}

// A row of S, unpacked, while a product goes on, a step for each 16 of the row's.
template <int M>
AMX void spread_beside(const Row& row, char* out, Product& product) {
  const char* values = row.values;
  for (int64_t c = 0; c < row.n; c += 32) {
    const uint32_t bits = bits_at<M>(row, c);
    const int kept = __builtin_popcount(bits);
    _mm_prefetch(values + AHEAD, _MM_HINT_T0);
    const __m512i w = halves512<M>(values, row.end, kept);
    _mm512_storeu_si512(out + 2 * c, _mm512_maskz_expand_epi16(bits, w));
    values += 2 * kept;
    if (c % 512 == 480 && product.step < product.steps) step_on(product);
  }
}

AMX void set_tiles() {
  _tile_loadconfig(&TILES);
  _tile_zero(0);
}
AMX void release_tiles() { _tile_release(); }

// For each byte of bits and each of its 8 places, which of the next values goes there; 0x80: none.
struct Places {
  alignas(16) uint8_t of[256][8];
  alignas(16) uint8_t pairs[256][16];  // the same in bytes of 16-bit values
  Places() {
    for (int byte = 0; byte < 256; byte++)
      for (int place = 0, before = 0; place < 8; place++) {
        const bool kept = byte >> place & 1;
        of[byte][place] = kept ? before : 0x80;
        pairs[byte][2 * place] = kept ? 2 * before : 0x80;
        pairs[byte][2 * place + 1] = kept ? 2 * before + 1 : 0x80;
        before += kept;
      }
  }
};
const Places PLACES;

// The next values, `kept` of them, as 8 of 16 or of 32 bits each in their places.
AVX2 inline __m128i place16(const char* values, const char* end, uint32_t byte, int kept) {
  __m128i w;
  if (values + 16 <= end) {
    w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  } else {
    alignas(16) char last[16] = {};
    std::memcpy(last, values, 2 * kept);
    w = _mm_load_si128(reinterpret_cast<const __m128i*>(last));
  }
  return _mm_shuffle_epi8(w, _mm_load_si128(reinterpret_cast<const __m128i*>(PLACES.pairs[byte])));
}

AVX2 inline __m256i place32(const char* values, const char* end, uint32_t byte, int kept) {
  __m256i w;
  if (values + 32 <= end) {
    w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  } else {
    alignas(32) char last[32] = {};
    std::memcpy(last, values, 4 * kept);
    w = _mm256_load_si256(reinterpret_cast<const __m256i*>(last));
  }
  const __m256i places = _mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES.of[byte])));
  return _mm256_andnot_si256(_mm256_srai_epi32(places, 31), _mm256_permutevar8x32_epi32(w, places));
}

template <int K, int T, int M>
AVX2 void times_avx2(const Row& row, const void* x, int64_t width, float* sums) {
  constexpr int size = K == F32 ? 4 : 2, SUMS = T < 4 ? 4 / T : 1;
  const char* values = row.values;
  __m256 total[SUMS][T];
  for (int i = 0; i < SUMS * T; i++) total[i / T][i % T] = _mm256_setzero_ps();
  for (int64_t c = 0; c < row.n; c += 32) {
    const uint32_t bits = bits_at<M>(row, c);
    if (M != PLAIN) _mm_prefetch(values + AHEAD, _MM_HINT_T0);
    UNROLLED
    for (int i = 0; i < 4; i++) {
      const uint32_t byte = bits >> 8 * i & 255;
      const int kept = __builtin_popcount(byte);
      __m256 w;
      if constexpr (K == F32) {
        w = _mm256_castsi256_ps(place32(values, row.end, byte, kept));
      } else {
        const __m128i halves = place16(values, row.end, byte, kept);
        w = K == F16 ? _mm256_cvtph_ps(halves)
                     : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
      }
      const float* in = static_cast<const float*>(x) + c + 8 * i;
      UNROLLED
      for (int t = 0; t < T; t++)
        total[i % SUMS][t] =
            _mm256_fmadd_ps(w, _mm256_loadu_ps(in + t * width), total[i % SUMS][t]);
      values += size * kept;
    }
  }
  UNROLLED
  for (int t = 0; t < T; t++)
    for (int i = 0; i < SUMS; i++) {
      alignas(32) float lanes[8];
      _mm256_store_ps(lanes, total[i][t]);
      for (float lane : lanes) sums[t] += lane;
    }
}

template <int SIZE, int M>
AVX2 const char* spread_avx2(const Row& row, char* out) {
  const char* values = row.values;
  for (int64_t c = 0; c < row.n; c += 32) {
    const uint32_t bits = bits_at<M>(row, c);
    for (int i = 0; i < 4 && c + 8 * i < row.n; i++) {
      const uint32_t byte = bits >> 8 * i & 255;
      const int kept = __builtin_popcount(byte);
      const int64_t at = c + 8 * i, some = std::min<int64_t>(8, row.n - at);
      alignas(32) char made[32];
      if constexpr (SIZE == 2)
        _mm_store_si128(reinterpret_cast<__m128i*>(made), place16(values, row.end, byte, kept));
      else
        _mm256_store_si256(reinterpret_cast<__m256i*>(made),
                           place32(values, row.end, byte, kept));
      std::memcpy(out + SIZE * at, made, SIZE * some);
      values += SIZE * kept;
    }
  }
  return values;
}

AVX2 int64_t kept_avx2(const Row& row) {
  int64_t kept = 0;
  for (int64_t c = 0; c < row.n; c += 32) kept += __builtin_popcount(next(row, c));
  return kept;
}

#define COUNT(set) (set == PORTABLE ? kept_portable : kept_avx2)
#define CHOSEN(what, set, ...)                     \
  (set >= WITH_AVX512 ? what##_avx512<__VA_ARGS__> \
   : set == WITH_AVX2 ? what##_avx2<__VA_ARGS__>   \
                      : what##_portable<__VA_ARGS__>)
#else
#define COUNT(set) kept_portable
#define CHOSEN(what, set, ...) what##_portable<__VA_ARGS__>
#endif

template <int K, int M>
Times times_of(Set set, int slab) {
  switch (slab) {
    case 1: return CHOSEN(times, set, K, 1, M);
    case 2: return CHOSEN(times, set, K, 2, M);
    case 4: return CHOSEN(times, set, K, 4, M);
    case 8: return CHOSEN(times, set, K, 8, M);
    default: return CHOSEN(times, set, K, 16, M);
  }
}

template <int M>
Times times_of(Kind kind, Set set, int slab) {
  return kind == BF16  ? times_of<BF16, M>(set, slab)
         : kind == F16 ? times_of<F16, M>(set, slab)
                       : times_of<F32, M>(set, slab);
}

template <int M>
Spread spread_of(int64_t size, Set set) {
  return size == 2 ? CHOSEN(spread, set, 2, M) : CHOSEN(spread, set, 4, M);
}

// The first whole line of the cache in a room of at least 15 floats more than are needed.
float* line(std::vector<float>& room) {
  return room.data() + (-reinterpret_cast<uintptr_t>(room.data()) & 63) / 4;
}

// `to` ← x (tokens, n) as the kernels read it: see `Times`.
void pad(const char* x, int64_t tokens, int64_t n, Kind kind, bool halves, int64_t by_token,
         int64_t by_column, float* to) {
  char* const rows = reinterpret_cast<char*>(to);
  for (int64_t t = 0; t < tokens; t++)
    if (halves)
      std::memcpy(rows + 2 * t * by_token, x + 2 * t * n, 2 * n);
    else
      for (int64_t c = 0; c < n; c++)
        to[t * by_token + c * by_column] = wide(x, t * n + c, kind);
}

int64_t up(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// What is multiplied: all pointers and sizes of one call.
struct Layer {
  Kind kind;
  int64_t m, n, k, size;
  const char* values;
  int64_t count;
  const uint8_t* bits;
  const int64_t* starts;  // where the values of each row begin, or null if each keeps `each`
  int64_t each;
  const char *B, *A, *bias;
  const Coded* coded = nullptr;  // if S is of codes; then the six before B are not read

  Row row(int64_t r) const {
    const int64_t start = starts ? starts[r] : r * each;
    return {values + start * size, values + count * size, bits, (m * n + 7) / 8, r * n, n};
  }
  Row row_of_A(int64_t r) const { return {A + r * n * size, A + k * n * size, nullptr, 0, 0, n}; }
  Row row_of_B(int64_t r) const { return {B + r * k * size, B + m * k * size, nullptr, 0, 0, k}; }
  float bias_of(int64_t r) const { return bias ? wide(bias, r, kind) : 0.0f; }
  int64_t entries() const { return m * n; }
  // Columns of a row of codes, in bfloat16, then zeros up to `up(columns)`.
  int64_t unpack(CodesRow by, int64_t r, int64_t from, int64_t column, int64_t columns,
                 char* out) const {
    std::memset(out + 2 * columns, 0, 2 * (up(columns) - columns));
    return by(*coded, r, from, column, columns, out);
  }
};

// Which of `count` rows are mine: from the first to before the second.
struct Share {
#ifdef _OPENMP
  int64_t mine = omp_get_thread_num(), all = omp_get_num_threads();
#else
  int64_t mine = 0, all = 1;
#endif
  int64_t from(int64_t count) const { return count * mine / all; }
  int64_t to(int64_t count) const { return count * (mine + 1) / all; }
};

// Tokens as codes want them.  `room` and `sums` keep them.
CodesInput for_codes(const Layer& layer, Set set, const char* x, int64_t some, int slab,
                     std::vector<float>& room, std::vector<float>& sums) {
  const Coded& S = *layer.coded;
  room.assign(slab * up(layer.n) + 15, 0.0f);
  float* const in = line(room);
  if (layer.kind != BF16 || !codes_in_halves(S, set, slab)) {
    pad(x, some, layer.n, layer.kind, false, up(layer.n), 1, in);
    return {in, nullptr, up(layer.n)};
  }
  sums.assign(slab * codes_sums(S), 0.0f);
  codes_input(S, reinterpret_cast<const uint16_t*>(x), some,
              reinterpret_cast<uint16_t*>(in), sums.data());
  return {in, sums.data(), up(layer.n)};
}

// How the rows of one of the layers that share their tokens are read.
struct Reader {
  CodesInput codes{};
  CodesTimes times = nullptr;
  std::vector<float> room, sums;  // of `codes`
  int64_t low = 0;                // where its part of `low` begins
};

// ys[l] (some, m) for the tokens of one slab, row by row, of `count` layers that they go into.
void by_rows(const Layer* layers, int count, Set set, int threads, const char* x, int64_t some,
             char* const* ys) {
  thread_local std::vector<float> room, low;
  thread_local std::vector<Reader> readers;
  const Kind kind = layers->kind;
  const int64_t n = layers->n, size = layers->size, width = up(n) + APART;
  const bool halves = kind == BF16 && set >= WITH_AVX512;
  const int slab = *std::find_if(SLABS, SLABS + 4, [&](int s) { return s >= some; });
  const int64_t by_column = set == PORTABLE ? slab : 1;
  room.assign(slab * width + 15, 0.0f);
  float* const in = line(room);
  pad(x, some, n, kind, halves, set == PORTABLE ? 1 : width, by_column, in);
  readers.resize(std::max<size_t>(readers.size(), count));
  int64_t lows = 0, codes = 0;
  for (int l = 0; l < count; l++) {
    Reader& reader = readers[l];
    const Layer& layer = layers[l];
    reader.low = lows, lows += slab * up(layer.k);
    if (!layer.coded) continue;
    reader.codes = for_codes(layer, set, x, some, slab, reader.room, reader.sums);
    reader.times = codes_times(*layer.coded, set, reader.codes.sums, slab);
    codes = std::max(codes, codes_room(*layer.coded));
  }
  low.assign(lows, 0.0f);
  float* const lowest = low.data();
  const Reader* const each = readers.data();
  const Times plain = times_of<PLAIN>(kind, set, slab);
  const Times sparse = times_of<SPARSE>(kind, set, slab);
  const Times fast = times_of<SWIFT>(kind, set, slab);
#pragma omp parallel num_threads(threads)
  {
    const Share share;
    thread_local std::vector<float> own;
    own.resize(std::max<size_t>(own.size(), codes));
    for (int l = 0; l < count; l++) {
      const Layer& layer = layers[l];
      const int64_t short_ = up(layer.k);
      float* const t = lowest + each[l].low;
      for (int64_t r = share.from(layer.k); r < share.to(layer.k); r++) {
        float sums[16] = {};
        plain(layer.row_of_A(r), in, width, sums);
        for (int64_t i = 0; i < some; i++) {  // rounded, as a product of its own would be
          char rounded[4];
          narrow(sums[i], rounded, 0, kind);
          if (halves)
            std::memcpy(reinterpret_cast<char*>(t) + 2 * (i * short_ + r), rounded, 2);
          else
            t[i * (set == PORTABLE ? 1 : short_) + r * by_column] = wide(rounded, 0, kind);
        }
      }
    }
#pragma omp barrier
    for (int l = 0; l < count; l++) {
      const Layer& layer = layers[l];
      for (int64_t r = share.from(layer.m); r < share.to(layer.m); r++) {
        float sums[16] = {};
        if (layer.coded) {
          each[l].times(*layer.coded, r, each[l].codes, own.data(), sums);
        } else {
          const Row row = layer.row(r);
          (swift(row, size) ? fast : sparse)(row, in, width, sums);
        }
        if (layer.k) plain(layer.row_of_B(r), lowest + each[l].low, up(layer.k), sums);
        for (int64_t i = 0; i < some; i++)
          narrow(sums[i] + layer.bias_of(r), ys[l], i * layer.m + r, kind);
      }
    }
  }
}

#if defined(__x86_64__)

#define COUNTING _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)

// Two bytes a value of (tokens, n), up to 16 tokens, in pairs of columns, (columns / 2, 16, 2),
// zeros where none are.
AVX512 void paired(const char* x, int64_t tokens, int64_t n, char* to) {
  const __mmask16 there = __mmask16(first(tokens));
  const __m512i at = _mm512_mullo_epi32(COUNTING, _mm512_set1_epi32(int(2 * n)));
  for (int64_t c = 0; c + 1 < n; c += 2)
    _mm512_storeu_si512(to + 32 * c, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, at,
                                                                 x + 2 * c, 1));
  std::memset(to + n / 2 * 64, 0, (up(n) / 2 - n / 2) * 64);
  for (int64_t t = 0; n % 2 && t < tokens; t++)
    std::memcpy(to + n / 2 * 64 + 4 * t, x + 2 * (t * n + n - 1), 2);
}

// Sixteen rows, aligned; 64 bytes more than a row apart, so that the lines of a tile lie in
// different sets of the cache.
struct Sixteen {
  int64_t stride;
  std::vector<char> room;
  char* rows;

  void reserve(int64_t n) {
    stride = 2 * up(n) + 64;
    if (int64_t(room.size()) < 16 * stride + 64) room.resize(16 * stride + 64);
    rows = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) & 63);
  }
  void copy(const char* from, int64_t count, int64_t n) {  // zeros where nothing is
    for (int64_t i = 0; i < 16; i++) {
      const int64_t there = i < count ? 2 * n : 0;
      if (there) std::memcpy(rows + i * stride, from + i * 2 * n, there);
      std::memset(rows + i * stride + there, 0, 2 * up(n) - there);
    }
  }
  Product times(const char* x, int64_t n) const { return {rows, stride, x, 0, (n + 31) / 32}; }
};

// t = A x in pairs, for groups of 16 tokens, `bytes` of x and `bytes_t` of t apart.
void factors(const Layer& layer, const Share& share, const char* x, int64_t bytes, char* ts,
             int64_t bytes_t, int64_t groups) {
  thread_local Sixteen rows;
  rows.reserve(layer.n);
  const int64_t all = (layer.k + 15) / 16 * groups;
  int64_t held = -1;
  for (int64_t p = share.from(all); p < share.to(all); p++) {
    const int64_t b = p / groups, g = p % groups, count = std::min<int64_t>(16, layer.k - 16 * b);
    if (b != held) rows.copy(layer.A + 32 * b * layer.n, count, layer.n);
    held = b;
    alignas(64) float sums[16][16] = {};
    Product product = rows.times(x + g * bytes, layer.n);
    finish(product, sums);
    for (int64_t i = 0; i < count; i++)
      for (int64_t j = 0; j < 16; j++)
        narrow(sums[i][j], ts + g * bytes_t + (16 * b + i) / 2 * 64, 2 * j + i % 2, BF16);
  }
}

// The same for bfloat16 on tiles, 16 rows at a time: unpacked while those before are multiplied.
void by_tiles(const Layer& layer, int threads, const char* x, int64_t some, char* y) {
  thread_local std::vector<char> room, low;
  room.resize(up(layer.n) / 2 * 64);
  paired(x, some, layer.n, room.data());
  low.assign(up(layer.k) / 2 * 64, 0);
  const char* const in = room.data();
  char* const t = low.data();
#pragma omp parallel num_threads(threads)
  {
    thread_local Sixteen two[2], factor;
    for (Sixteen& each : two) each.reserve(layer.n);
    const Share share;
    const int64_t blocks = (layer.m + 15) / 16;
    const CodesRow unpack = layer.coded ? codes_row(*layer.coded, WITH_AMX, 2) : nullptr;
    set_tiles();
    factors(layer, share, in, 0, t, 0, 1);
#pragma omp barrier
    factor.reserve(layer.k);
    Product before{nullptr, 0, nullptr, 0, 0};
    const int64_t to = share.to(blocks);
    for (int64_t b = share.from(blocks); b <= to; b++) {
      Sixteen& mine = two[b % 2];
      for (int64_t i = 0; i < 16 && b < to; i++) {
        char* const out = mine.rows + i * mine.stride;
        if (16 * b + i < layer.m && layer.coded) {
          layer.unpack(unpack, 16 * b + i, layer.coded->start(16 * b + i), 0, layer.n, out);
          while (before.step * 16 < before.steps * (i + 1)) step_on(before);
        } else if (16 * b + i < layer.m) {
          const Row row = layer.row(16 * b + i);
          (swift(row, 2) ? spread_beside<SWIFT> : spread_beside<SPARSE>)(row, out, before);
        } else {
          std::memset(out, 0, 2 * up(layer.n));
        }
      }
      if (before.rows) {
        alignas(64) float sums[16][16] = {};
        const int64_t top = 16 * (b - 1), count = std::min<int64_t>(16, layer.m - top);
        finish(before, sums);
        if (layer.k) {
          factor.copy(layer.B + 2 * top * layer.k, count, layer.k);
          Product product = factor.times(t, layer.k);
          finish(product, sums);
        }
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = 0; j < some; j++)
            narrow(sums[i][j] + layer.bias_of(top + i), y, j * layer.m + top + i, BF16);
      }
      before = mine.times(in, layer.n);
    }
    release_tiles();
  }
}

// Rows of S times many tokens: `high` rows at a time are unpacked, up to WIDE columns of them, and
// stay in the cache while the tokens pass by.
constexpr int64_t WIDE = 4096;

struct Panel {
  int64_t stride, width;  // bytes of a row; floats of a row of sums
  std::vector<char> room;
  std::vector<float> sums;
  char* rows;

  void reserve(int64_t high, int64_t n, int64_t tokens) {
    stride = 2 * std::min(up(n), WIDE) + 64, width = tokens + 16;
    room.resize(std::max<size_t>(room.size(), high * stride + 64));
    sums.resize(high * width);
    rows = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) & 63);
  }
};

// sums (rows, tokens) += panel times x, 32 rows and 32 tokens at once; x in groups of 16 tokens,
// `group` bytes apart.
AMX void times_panel(Panel& panel, int64_t rows, int64_t steps, const char* x, int64_t group,
                     int64_t groups) {
  const int64_t across = 4 * panel.width;
  for (int64_t g = 0; g < groups; g += 2)
    for (int64_t r = 0; r < rows; r += 32) {
      float* const out = panel.sums.data() + r * panel.width + 16 * g;
      const char* const S = panel.rows + r * panel.stride;
      _tile_loadd(0, out, across);
      _tile_loadd(1, out + 16, across);
      _tile_loadd(2, out + 16 * panel.width, across);
      _tile_loadd(3, out + 16 * panel.width + 16, across);
      for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, S + 64 * step, panel.stride);
        _tile_loadd(6, x + g * group + 1024 * step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, x + (g + 1) * group + 1024 * step, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, S + 16 * panel.stride + 64 * step, panel.stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, out, across);
      _tile_stored(1, out + 16, across);
      _tile_stored(2, out + 16 * panel.width, across);
      _tile_stored(3, out + 16 * panel.width + 16, across);
    }
}

// y[t, top + r] = sums[r, t] + b[r], for up to 16 rows.
AVX512 void put(const Panel& panel, const Layer& layer, int64_t r, int64_t top, int64_t rows,
                int64_t tokens, char* y) {
  alignas(64) float b[16] = {};
  for (int64_t i = 0; i < rows; i++) b[i] = layer.bias_of(top + r + i);
  const __m512 bias = _mm512_load_ps(b);
  const __m512i at = _mm512_mullo_epi32(COUNTING, _mm512_set1_epi32(int(panel.width)));
  const float* const from = panel.sums.data() + r * panel.width;
  for (int64_t t = 0; t < tokens; t++) {
    const __m512 sum = _mm512_add_ps(_mm512_i32gather_ps(at, from + t, 4), bias);
    _mm256_mask_storeu_epi16(y + 2 * (t * layer.m + top + r), __mmask16(first(rows)),
                             (__m256i)_mm512_cvtneps_pbh(sum));
  }
}

void by_panels(const Layer& layer, int threads, const char* x, int64_t tokens, char* y) {
  thread_local std::vector<char> room, low;
  const int64_t groups = (tokens + 31) / 32 * 2, bytes = up(layer.n) / 2 * 64,
                bytes_t = up(layer.k) / 2 * 64;
  const int64_t high = 32 * std::clamp<int64_t>(layer.m / (32 * 4 * threads), 1, 4);
  room.resize(groups * bytes);
  low.assign(groups * bytes_t, 0);
  char* const in = room.data();
  char* const ts = low.data();
#pragma omp parallel num_threads(threads)
  {
    const Share share;
    thread_local Panel panel;
    panel.reserve(high, std::max(layer.n, layer.k), 16 * groups);
    const char* next_values[128];
    int64_t next_codes[128];
    const CodesRow unpack = layer.coded ? codes_row(*layer.coded, WITH_AMX, 2) : nullptr;
    set_tiles();
    for (int64_t g = share.from(groups); g < share.to(groups); g++)
      paired(x + 32 * g * layer.n, std::clamp<int64_t>(tokens - 16 * g, 0, 16), layer.n,
             in + g * bytes);
#pragma omp barrier
    factors(layer, share, in, bytes, ts, bytes_t, groups);
#pragma omp barrier
    const int64_t panels = (layer.m + high - 1) / high;
    for (int64_t p = share.from(panels); p < share.to(panels); p++) {
      const int64_t top = p * high, rows = std::min(high, layer.m - top);
      std::fill(panel.sums.begin(), panel.sums.end(), 0.0f);
      for (int64_t i = 0; i < rows && !layer.coded; i++)
        next_values[i] = layer.row(top + i).values;
      for (int64_t i = 0; i < rows && layer.coded; i++)
        next_codes[i] = layer.coded->start(top + i);
      for (int64_t c = 0; c < layer.n; c += WIDE) {
        const int64_t columns = std::min(WIDE, layer.n - c);
        for (int64_t i = 0; i < high; i++) {
          char* const out = panel.rows + i * panel.stride;
          if (i >= rows || columns % 32) std::memset(out, 0, 2 * up(columns));
          if (i >= rows) continue;
          if (layer.coded) {
            next_codes[i] = layer.unpack(unpack, top + i, next_codes[i], c, columns, out);
            continue;
          }
          Row row = layer.row(top + i);
          row.values = next_values[i], row.at += c, row.n = columns;
          next_values[i] =
              (swift(row, 2) ? spread_avx512<2, SWIFT> : spread_avx512<2, SPARSE>)(row, out);
        }
        times_panel(panel, high, (columns + 31) / 32, in + c / 2 * 64, bytes, groups);
      }
      for (int64_t c = 0; c < layer.k; c += WIDE) {
        const int64_t columns = std::min(WIDE, layer.k - c);
        for (int64_t i = 0; i < high; i++) {
          char* const out = panel.rows + i * panel.stride;
          std::memset(out, 0, 2 * up(columns));
          if (i < rows)
            std::memcpy(out, layer.B + 2 * ((top + i) * layer.k + c), 2 * columns);
        }
        times_panel(panel, high, (columns + 31) / 32, ts + c / 2 * 64, bytes_t, groups);
      }
      for (int64_t r = 0; r < rows; r += 16)
        put(panel, layer, r, top, std::min<int64_t>(16, rows - r), tokens, y);
    }
    release_tiles();
  }
}

// May this process use tiles?  Linux wants to be asked.
bool tiles() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned both = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & both) != both) return false;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, tile data
#else
  return false;
#endif
}

#endif

// y (tokens, m) of each layer by the way that is fast for as many tokens.  All have x in common.
void multiply(const Layer* layers, int count, Set set, int threads, int64_t tokens, const char* x,
              char* const* ys) {
  int64_t entries = 0, most = set < WITH_AVX512 ? 8 : 16;
  bool by_tile = set == WITH_AMX && layers->kind == BF16;
  for (int l = 0; l < count; l++) {
    entries += layers[l].entries();
    if (!layers[l].coded) continue;
    most = 8;
#if defined(__x86_64__)
    by_tile = by_tile && codes_row(*layers[l].coded, set, 2);
#endif
  }
  threads = int(std::clamp<int64_t>(entries / SHARE, 1, threads));
  std::vector<char*> outs(ys, ys + count);
  int64_t some = 0;
  for (int64_t from = 0; from < tokens; from += some) {
    const char* const in = x + from * layers->n * layers->size;
    for (int l = 0; l < count; l++) outs[l] = ys[l] + from * layers[l].m * layers[l].size;
#if defined(__x86_64__)
    if (by_tile && tokens - from > FEW) {
      some = std::min(MANY, tokens - from);
      for (int l = 0; l < count; l++)
        (some > 16 ? by_panels : by_tiles)(layers[l], threads, in, some, outs[l]);
      continue;
    }
#endif
    some = std::min(most, tokens - from);
    by_rows(layers, count, set, threads, in, some, outs.data());
  }
}

}  // namespace

extern "C" {

// The best instruction set of this processor, as in `Set`.
int slr_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512bf16");
  return !avx2 ? PORTABLE : !avx512 ? WITH_AVX2 : tiles() ? WITH_AMX : WITH_AVX512;
#else
  return PORTABLE;
#endif
}

// ys[l] (tokens, m) = S x + B (A x) + b of `count` layers that have x (tokens, n) in common; all of
// one kind and contiguous.
void slr_together(int kind, int set, int threads, int64_t tokens, int64_t n, int count,
                  const Part* parts, const char* x, char* const* ys) {
  std::vector<Layer> layers;
  for (const Part* p = parts; p < parts + count; p++)
    layers.push_back({Kind(kind), p->m, n, p->k, kind == F32 ? 4 : 2, p->values, p->count, p->bits,
                      p->starts, p->each, p->B, p->A, p->bias, p->coded});
  multiply(layers.data(), count, Set(set), threads, tokens, x, ys);
}

// The same of one layer: A (k, n), B (m, k), b (m) or null.
void slr_few(int kind, int set, int threads, int64_t tokens, int64_t m, int64_t n, int64_t k,
             const char* x, const char* values, int64_t count, const uint8_t* bits,
             const int64_t* starts, int64_t each, const char* B, const char* A, const char* bias,
             char* y) {
  const Part part{m, k, values, count, bits, starts, each, B, A, bias, nullptr};
  slr_together(kind, set, threads, tokens, n, 1, &part, x, &y);
}

// The same with S of codes.
void slr_codes(int kind, int set, int threads, int64_t tokens, const Coded* S, int64_t k,
               const char* x, const char* B, const char* A, const char* bias, char* y) {
  const Part part{S->m, k, nullptr, 0, nullptr, nullptr, 0, B, A, bias, S};
  slr_together(kind, set, threads, tokens, S->n, 1, &part, x, &y);
}

// Where the values of each row begin, (m + 1); returns whether rows keep different numbers.
int slr_starts(int set_, int threads, int64_t m, int64_t n, const uint8_t* bits, int64_t* starts) {
  const Set set = Set(set_);
  const Layer layer{F32, m, n, 0, 4, nullptr, 0, bits, nullptr, 0, nullptr, nullptr, nullptr};
  threads = int(std::clamp<int64_t>(layer.entries() / SHARE, 1, threads));
  int64_t (*const count)(const Row&) = COUNT(set);
  starts[0] = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < m; r++) starts[r + 1] = count(layer.row(r));
  const bool differ = m && std::count(starts + 1, starts + m + 1, starts[1]) != m;
  for (int64_t r = 0; r < m; r++) starts[r + 1] += starts[r];
  return differ;
}

// Rows of S from `top` on, unpacked into `out` (rows, n), of 2 or 4 bytes a value.
void slr_spread(int size, int set_, int threads, int64_t m, int64_t n, int64_t top, int64_t rows,
                const char* values, int64_t count, const uint8_t* bits, const int64_t* starts,
                int64_t each, char* out) {
  const Set set = Set(set_);
  const Layer layer{F32, m, n, 0, size, values, count, bits, starts, each, nullptr, nullptr, nullptr};
  const Spread careful = spread_of<SPARSE>(size, set), fast = spread_of<SWIFT>(size, set);
  threads = int(std::clamp<int64_t>(rows * n / SHARE, 1, threads));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    const Row row = layer.row(top + i);
    (swift(row, size) ? fast : careful)(row, out + i * n * size);
  }
}

}  // extern "C"
