// y = S x + b, and S unpacked, on a CPU, with the values of S as codes of a few bits.
//
// The codes of the kept entries lie one after another, a plane for each bit, lowest first (bytes,
// for 8 bits); value = (code - zero) * scale, a scale (and a zero) for each group of columns of a
// row; a bit an entry says which are kept, if not all are.  With AVX-512, 64 codes come from as many
// bits of each plane by masked moves, a mask puts them in place by one instruction, and they are
// multiplied as they are made.  Elsewhere a table turns 8 bits into 8 bytes.  Sums are in float32.
// Threads share rows.
//
// Compiled and called like native.cpp, which has the rest.  Book: chapter 16.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt"
#define AVX512 __attribute__((target(WITH_512)))
#define INLINE __attribute__((always_inline, target(WITH_512)))
#endif
#define UNROLLED _Pragma("GCC unroll 16")

namespace {

enum Kind { BF16, F16, F32 };
constexpr int WITH_AVX512 = 2;            // of `Set` in native.cpp
constexpr int64_t SHARE = 1 << 16;        // entries below which a thread is not worth waking
constexpr int64_t PAD = 64;               // columns that are made at once
constexpr int64_t SLAB = 8;               // tokens that are multiplied at once

struct Coded {
  int64_t m, n;
  int bits;
  const uint8_t* planes;
  int64_t stride, kept;     // bytes of a plane, codes in all
  const uint16_t* scale;    // bfloat16, (m, groups)
  const uint8_t* zero;      // (m, groups), or null: 2^(bits - 1) everywhere
  int64_t group;            // columns of a group
  const uint8_t* mask;      // or null: all are kept
  const int64_t* starts;    // codes before each row, or null:
  int64_t each;             // as many in every row

  int64_t groups() const { return (n + group - 1) / group; }
  float zero_of(int64_t g) const { return zero ? zero[g] : float(1 << (bits - 1)); }
  int64_t start(int64_t r) const { return starts ? starts[r] : r * each; }
};

inline float of_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline bool kept_at(const Coded& S, int64_t entry) {
  return !S.mask || (S.mask[entry >> 3] >> (entry & 7) & 1);
}

// 8 bytes of 0 or 1 from 8 bits.
struct Table {
  uint64_t spread[256];
  Table() {
    for (int byte = 0; byte < 256; byte++) {
      spread[byte] = 0;
      for (int bit = 0; bit < 8; bit++) spread[byte] |= uint64_t(byte >> bit & 1) << 8 * bit;
    }
  }
};
const Table TABLE;

// Up to `count` codes from number `from` on, as bytes; `out` has room for 8 more.
void codes_portable(const Coded& S, int64_t from, int64_t count, uint8_t* out) {
  if (S.bits == 8) {
    std::memcpy(out, S.planes + from, count);
    return;
  }
  const int64_t byte = from >> 3;
  const int by = from & 7;
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t eight = 0;
    const int64_t at = byte + (i >> 3);
    for (int bit = 0; bit < S.bits; bit++) {
      const uint8_t* const plane = S.planes + bit * S.stride;
      const unsigned more = at + 1 < S.stride ? plane[at + 1] : 0;
      const unsigned two = (at < S.stride ? plane[at] : 0) | more << 8;
      eight |= TABLE.spread[two >> by & 255] << bit;
    }
    std::memcpy(out + i, &eight, 8);
  }
}

// A row of S in float32.
void row_portable(const Coded& S, int64_t r, std::vector<uint8_t>& room, float* out) {
  const int64_t from = S.start(r), count = (S.starts ? S.starts[r + 1] - from : S.each);
  room.resize(S.n + 16);
  codes_portable(S, from, count, room.data());
  const uint8_t* code = room.data();
  for (int64_t g = 0, groups = S.groups(); g < groups; g++) {
    const float scale = of_bfloat16(S.scale[r * groups + g]), zero = S.zero_of(r * groups + g);
    const int64_t to = std::min(S.n, (g + 1) * S.group);
    if (!S.mask)
      for (int64_t j = g * S.group; j < to; j++) out[j] = (float(*code++) - zero) * scale;
    else
      for (int64_t j = g * S.group; j < to; j++)
        out[j] = kept_at(S, r * S.n + j) ? (float(*code++) - zero) * scale : 0.0f;
  }
}

void times_portable(const float* row, const float* x, int64_t wide, int64_t n, int64_t tokens,
                    float* sums) {
  for (int64_t t = 0; t < tokens; t++) {
    float part[16] = {};
    const float* const in = x + t * wide;
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
      for (int i = 0; i < 16; i++) part[i] += row[j + i] * in[j + i];
    for (int i = 0; j < n; j++, i++) part[i] += row[j] * in[j];
    sums[t] = 0;
    for (float each : part) sums[t] += each;
  }
}

#if defined(__x86_64__)

// 64 bits of a plane from number `from` on; nothing behind its end is read.
inline uint64_t bits_at(const uint8_t* plane, int64_t stride, int64_t from) {
  const int64_t byte = from >> 3;
  const int by = from & 7;
  uint64_t low = 0;
  if (byte + 9 <= stride) {
    std::memcpy(&low, plane + byte, 8);
    return by ? low >> by | uint64_t(plane[byte + 8]) << (64 - by) : low;
  }
  if (byte < stride) std::memcpy(&low, plane + byte, std::min<int64_t>(8, stride - byte));
  return low >> by;
}

AVX512 inline __m512i codes_avx512(const Coded& S, int64_t from, int64_t count) {
  if (S.bits == 8) {
    const __mmask64 there = count >= 64 ? ~0ull : (1ull << count) - 1;
    return _mm512_maskz_loadu_epi8(there, S.planes + from);
  }
  __m512i codes = _mm512_setzero_si512();
  for (int bit = 0; bit < S.bits; bit++) {
    const __mmask64 set = bits_at(S.planes + bit * S.stride, S.stride, from);
    codes = _mm512_or_si512(codes, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(char(1 << bit))));
  }
  return codes;
}

AVX512 inline __m128i sixteen(__m512i bytes, int i) {
  switch (i) {
    case 0: return _mm512_castsi512_si128(bytes);
    case 1: return _mm512_extracti32x4_epi32(bytes, 1);
    case 2: return _mm512_extracti32x4_epi32(bytes, 2);
    default: return _mm512_extracti32x4_epi32(bytes, 3);
  }
}

// Calls `use(v, column)` for a row, 16 values at a time; groups are multiples of 16.
template <bool MASKED, class Use>
AVX512 inline void walk_avx512(const Coded& S, int64_t r, Use use) {
  const int64_t bytes = (S.m * S.n + 7) / 8;
  int64_t from = S.start(r), g = r * S.groups(), until = 0;
  __m512 scale = _mm512_setzero_ps(), shift = scale;
  g--;
  for (int64_t j = 0; j < S.n; j += 64) {
    const int64_t left = std::min<int64_t>(64, S.n - j);
    uint64_t there = left == 64 ? ~0ull : (1ull << left) - 1;
    if (MASKED) there &= bits_at(S.mask, bytes, r * S.n + j);
    const int64_t count = MASKED ? _mm_popcnt_u64(there) : left;
    __m512i codes = codes_avx512(S, from, count);
    if (MASKED) codes = _mm512_maskz_expand_epi8(there, codes);
    from += count;
    UNROLLED for (int i = 0; i < 4; i++) {
      if (16 * i >= left) break;
      if (j + 16 * i >= until) {
        const float s = of_bfloat16(S.scale[++g]);
        until += S.group;
        scale = _mm512_set1_ps(s), shift = _mm512_set1_ps(-S.zero_of(g) * s);
      }
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen(codes, i)));
      const __m512 v = MASKED || left < 64
                           ? _mm512_maskz_fmadd_ps(__mmask16(there >> 16 * i), code, scale, shift)
                           : _mm512_fmadd_ps(code, scale, shift);
      use(v, j + 16 * i);
    }
  }
}

template <int T, bool MASKED>
AVX512 void times_avx512(const Coded& S, int64_t r, const float* x, int64_t wide, float* sums) {
  __m512 sum[T];
  UNROLLED for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
  walk_avx512<MASKED>(S, r, [&](__m512 v, int64_t j) INLINE {
    UNROLLED for (int t = 0; t < T; t++)
      sum[t] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + t * wide + j), sum[t]);
  });
  UNROLLED for (int t = 0; t < T; t++) sums[t] = _mm512_reduce_add_ps(sum[t]);
}

// A row of S in float32, or in bfloat16, into `out`.
template <bool MASKED>
AVX512 void row_avx512(const Coded& S, int64_t r, Kind kind, char* out) {
  if (kind == F32)
    walk_avx512<MASKED>(S, r, [&](__m512 v, int64_t j) INLINE {
      const __mmask16 there = S.n - j >= 16 ? 0xffff : (1 << (S.n - j)) - 1;
      _mm512_mask_storeu_ps(out + 4 * j, there, v);
    });
  else
    walk_avx512<MASKED>(S, r, [&](__m512 v, int64_t j) INLINE {
      const __mmask16 there = S.n - j >= 16 ? 0xffff : (1 << (S.n - j)) - 1;
      _mm256_mask_storeu_epi16(out + 2 * j, there, (__m256i)_mm512_cvtneps_pbh(v));
    });
}

using Times = void (*)(const Coded&, int64_t, const float*, int64_t, float*);
template <bool MASKED>
constexpr Times TIMES[] = {
    nullptr,
    times_avx512<1, MASKED>,
    times_avx512<2, MASKED>,
    times_avx512<3, MASKED>,
    times_avx512<4, MASKED>,
    times_avx512<5, MASKED>,
    times_avx512<6, MASKED>,
    times_avx512<7, MASKED>,
    times_avx512<8, MASKED>,
};

#endif

}  // namespace

extern "C" {

// Rows of S from `top` on, in float32 or bfloat16, into `out` (rows, n).
void slr_codes_rows(int kind, int set, int threads, const Coded* coded, int64_t top, int64_t rows,
                    char* out) {
  const Coded& S = *coded;
  const bool fast = set >= WITH_AVX512 && S.group % 16 == 0;
  threads = int(std::clamp<int64_t>(rows * S.n / SHARE, 1, threads));
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> room;
    std::vector<float> row(S.n + PAD);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
#if defined(__x86_64__)
      if (fast) {
        const int64_t size = kind == F32 ? 4 : 2;
        (S.mask ? row_avx512<true> : row_avx512<false>)(S, top + i, Kind(kind), out + size * i * S.n);
        continue;
      }
#endif
      row_portable(S, top + i, room, row.data());
      if (kind == F32) {
        std::memcpy(out + 4 * i * S.n, row.data(), 4 * S.n);
      } else {
        uint16_t* const to = (uint16_t*)out + i * S.n;
        for (int64_t j = 0; j < S.n; j++) to[j] = bfloat16(row[j]);
      }
    }
  }
}

// y (tokens, m) = S x + b in float32; x (tokens, wide), padded to a multiple of 64 columns.
void slr_codes_few(int set, int threads, const Coded* coded, int64_t tokens, int64_t wide,
                   const float* x, const float* bias, float* y) {
  const Coded& S = *coded;
  const bool fast = set >= WITH_AVX512 && S.group % 16 == 0;
  threads = int(std::clamp<int64_t>(S.m * S.n / SHARE, 1, threads));
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> room;
    std::vector<float> row(S.n + PAD);
    float sums[SLAB];
#pragma omp for schedule(static)
    for (int64_t r = 0; r < S.m; r++) {
      if (!fast) row_portable(S, r, room, row.data());
      for (int64_t t = 0; t < tokens; t += SLAB) {
        const int64_t some = std::min(SLAB, tokens - t);
#if defined(__x86_64__)
        if (fast)
          (S.mask ? TIMES<true> : TIMES<false>)[some](S, r, x + t * wide, wide, sums);
        else
#endif
          times_portable(row.data(), x + t * wide, wide, S.n, some, sums);
        for (int64_t i = 0; i < some; i++) y[(t + i) * S.m + r] = sums[i] + (bias ? bias[r] : 0);
      }
    }
  }
}

}  // extern "C"
