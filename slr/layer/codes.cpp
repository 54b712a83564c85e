// y = S x, and S unpacked, on a CPU, with the values of S as codes of a few bits.
//
// The codes of the kept entries lie one after another, a plane for each bit, lowest first (bytes,
// for 8 bits); value = (code - zero) * scale, a scale (and a zero) for each group of columns of a
// row; a bit an entry says which are kept, if not all are.  With AVX-512, 64 codes come from as many
// bits of each plane by masked additions, and a mask puts them in place by one instruction.
//
// Few tokens in bfloat16 need no conversion: 0x4300 + code is 128 + code in bfloat16, so codes meet x
// as they are, and (128 + zero) * scale times the sum of x over each group is taken off at the end.
// Else a code becomes a float.  Elsewhere a table turns 8 bits into 8 bytes.  Sums are in float32.
//
// Compiled with native.cpp, whose loops over rows and tokens call it.  Book: chapter 18.

#include "codes.h"

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

constexpr int WITH_AVX512 = 2;      // of `Set` in native.cpp
constexpr int64_t SHARE = 1 << 16;  // entries below which a thread is not worth waking
constexpr int64_t BLOCK = 64;       // columns that are made at once
constexpr int64_t AHEAD = 4096;     // codes asked for before they are needed

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

// A row of S in float32; `room` has place for it and for its codes behind it.
void row_portable(const Coded& S, int64_t r, float* room) {
  const int64_t from = S.start(r), count = S.starts ? S.starts[r + 1] - from : S.each;
  uint8_t* code = reinterpret_cast<uint8_t*>(room + S.n);
  codes_portable(S, from, count, code);
  for (int64_t g = 0, groups = S.groups(); g < groups; g++) {
    const float scale = of_bfloat16(S.scale[r * groups + g]), zero = S.zero_of(r * groups + g);
    const int64_t to = std::min(S.n, (g + 1) * S.group);
    for (int64_t j = g * S.group; j < to; j++)
      room[j] = kept_at(S, r * S.n + j) ? (float(*code++) - zero) * scale : 0.0f;
  }
}

template <int T>
void times_portable(const Coded& S, int64_t r, const CodesInput& in, float* room, float* sums) {
  row_portable(S, r, room);
  for (int64_t t = 0; t < T; t++) {
    float part[16] = {};
    const float* const x = static_cast<const float*>(in.x) + t * in.width;
    int64_t j = 0;
    for (; j + 16 <= S.n; j += 16)
      for (int i = 0; i < 16; i++) part[i] += room[j + i] * x[j + i];
    for (int i = 0; j < S.n; j++, i++) part[i] += room[j] * x[j];
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

// The next 64 codes of BITS bits, or as many as S says if that is 0; `count` of them are wanted.
// SWIFT: they begin with a byte, and all 64 are there.
template <int BITS, bool SWIFT>
AVX512 inline __m512i codes_avx512(const Coded& S, int64_t from, int64_t count) {
  const int bits = BITS ? BITS : S.bits;
  if (bits == 8) {
    const __mmask64 there = SWIFT || count >= 64 ? ~0ull : (1ull << count) - 1;
    return _mm512_maskz_loadu_epi8(there, S.planes + from);
  }
  __m512i codes = _mm512_setzero_si512();
  UNROLLED for (int bit = 0; bit < bits; bit++) {
    const uint8_t* const plane = S.planes + bit * S.stride;
    uint64_t set;
    if (SWIFT)
      std::memcpy(&set, plane + from / 8, 8);
    else
      set = bits_at(plane, S.stride, from);
    codes = _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(char(1 << bit)));
  }
  return codes;
}

// Of each plane the 64 bytes that are needed later.
template <int BITS>
inline void ask_ahead(const Coded& S, int64_t from) {
  if (BITS == 8)
    _mm_prefetch(S.planes + from + AHEAD, _MM_HINT_T0);
  else
    for (int bit = 0; bit < BITS; bit++)
      _mm_prefetch(S.planes + bit * S.stride + (from + AHEAD) / 8, _MM_HINT_T0);
}

// Can a row be read without care?
inline bool swift(const Coded& S, int64_t from, int64_t columns) {
  const int64_t to = from + (columns + BLOCK - 1) / BLOCK * BLOCK;
  return !S.mask && (S.bits == 8 ? to <= S.stride : from % 8 == 0 && to / 8 <= S.stride);
}

// Which of the 64 columns from `column` on are kept; `left` of them are in the row.
inline uint64_t there(const Coded& S, int64_t r, int64_t column, int64_t left) {
  const uint64_t all = left >= 64 ? ~0ull : (1ull << left) - 1;
  return S.mask ? all & bits_at(S.mask, (S.m * S.n + 7) / 8, r * S.n + column) : all;
}

AVX512 inline __m128i sixteen(__m512i bytes, int i) {
  switch (i) {
    case 0: return _mm512_castsi512_si128(bytes);
    case 1: return _mm512_extracti32x4_epi32(bytes, 1);
    case 2: return _mm512_extracti32x4_epi32(bytes, 2);
    default: return _mm512_extracti32x4_epi32(bytes, 3);
  }
}

// Calls `use(v, column)` for some columns of a row, 16 values at a time; groups are multiples of 16,
// or the row.  Returns where the codes behind them begin.
template <int BITS, bool SWIFT, class Use>
AVX512 inline int64_t walk_avx512(const Coded& S, int64_t r, int64_t from, int64_t column,
                                  int64_t columns, Use use) {
  int64_t g = r * S.groups() + column / S.group - 1, until = column / S.group * S.group;
  __m512 scale = _mm512_setzero_ps(), shift = scale;
  for (int64_t j = column, end = column + columns; j < end; j += BLOCK) {
    const int64_t left = std::min(BLOCK, end - j);
    const uint64_t mine = SWIFT ? ~0ull : there(S, r, j, left);
    const int64_t count = SWIFT ? left : _mm_popcnt_u64(mine);
    __m512i codes = codes_avx512<BITS, SWIFT>(S, from, count);
    if (!SWIFT) codes = _mm512_maskz_expand_epi8(mine, codes);
    from += count;
    UNROLLED for (int i = 0; i < 4; i++) {
      if (16 * i >= left) break;
      if (j + 16 * i >= until) {
        const float s = of_bfloat16(S.scale[++g]);
        until += S.group;
        scale = _mm512_set1_ps(s), shift = _mm512_set1_ps(-S.zero_of(g) * s);
      }
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen(codes, i)));
      use(SWIFT ? _mm512_fmadd_ps(code, scale, shift)
                : _mm512_maskz_fmadd_ps(__mmask16(mine >> 16 * i), code, scale, shift),
          j + 16 * i);
    }
  }
  return from;
}

template <int BITS, int SIZE, bool SWIFT>
AVX512 int64_t row_avx512(const Coded& S, int64_t r, int64_t from, int64_t column, int64_t columns,
                          char* out) {
  return walk_avx512<BITS, SWIFT>(S, r, from, column, columns, [&](__m512 v, int64_t j) INLINE {
    const int64_t at = j - column, left = columns - at;
    const __mmask16 inside = left >= 16 ? 0xffff : (1 << left) - 1;
    if (SIZE == 4)
      _mm512_mask_storeu_ps(out + 4 * at, inside, v);
    else
      _mm256_mask_storeu_epi16(out + 2 * at, inside, (__m256i)_mm512_cvtneps_pbh(v));
  });
}

template <int BITS, int SIZE>
int64_t row_of(const Coded& S, int64_t r, int64_t from, int64_t column, int64_t columns, char* out) {
  return (swift(S, from, columns) ? row_avx512<BITS, SIZE, true> : row_avx512<BITS, SIZE, false>)(
      S, r, from, column, columns, out);
}

template <int T, bool SWIFT>
AVX512 void floats_avx512(const Coded& S, int64_t r, const CodesInput& in, float* sums) {
  const float* const x = static_cast<const float*>(in.x);
  __m512 total[T];
  UNROLLED for (int t = 0; t < T; t++) total[t] = _mm512_setzero_ps();
  walk_avx512<0, SWIFT>(S, r, S.start(r), 0, S.n, [&](__m512 v, int64_t j) INLINE {
    UNROLLED for (int t = 0; t < T; t++)
      total[t] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + t * in.width + j), total[t]);
  });
  UNROLLED for (int t = 0; t < T; t++) sums[t] = _mm512_reduce_add_ps(total[t]);
}

// 128 + code in bfloat16, of the first and of the last 8 codes in each 16.
#define FIRST(codes) (__m512bh) _mm512_unpacklo_epi8(codes, _mm512_set1_epi8(0x43))
#define LAST(codes) (__m512bh) _mm512_unpackhi_epi8(codes, _mm512_set1_epi8(0x43))
#define EACH(f0, f1, f2, f3) \
  _mm512_set_epi32(f3, f3, f3, f3, f2, f2, f2, f2, f1, f1, f1, f1, f0, f0, f0, f0)

// A row times x in bfloat16.  Codes of 8 bits are taken as two of 4.
template <int BITS, int T, bool SWIFT>
AVX512 void halves_avx512(const Coded& S, int64_t r, const CodesInput& in, float* scales,
                          float* sums) {
  constexpr float MORE = BITS == 8 ? 128 * 17 : 128;
  const uint16_t* const x = static_cast<const uint16_t*>(in.x);
  const int64_t groups = S.groups(), wide = codes_sums(S);
  const uint8_t* const zeros = S.zero ? S.zero + r * groups : nullptr;
  __m512 total[T];
  UNROLLED for (int t = 0; t < T; t++) total[t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g += 16) {
    const __mmask16 some = groups - g >= 16 ? 0xffff : (1 << (groups - g)) - 1;
    const __m256i stored = _mm256_maskz_loadu_epi16(some, S.scale + r * groups + g);
    const __m512 s = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    __m512 zero = _mm512_set1_ps(float(1 << (BITS - 1)));
    if (zeros)
      zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, zeros + g)));
    const __m512 shift = _mm512_mul_ps(s, _mm512_add_ps(zero, _mm512_set1_ps(MORE)));
    _mm512_storeu_ps(scales + g, s);
    UNROLLED for (int t = 0; t < T; t++)
      total[t] = _mm512_fnmadd_ps(shift, _mm512_loadu_ps(in.sums + t * wide + g), total[t]);
  }
  const int fine = groups == 1 || S.group >= BLOCK ? 0 : int(BLOCK / S.group);  // groups of a block
  const __m512i lanes = fine == 2 ? EACH(0, 0, 1, 1) : EACH(0, 1, 2, 3);
  const __m512i bytes = fine == 2 ? EACH(0, 0, 0x01010101, 0x01010101)
                                  : EACH(0, 0x01010101, 0x02020202, 0x03030303);
  int64_t from = S.start(r), g = 0, until = S.group;
  for (int64_t j = 0; j < S.n; j += BLOCK) {
    if (BITS == 8 || j % (8 * BLOCK) == 0) ask_ahead<BITS>(S, from);
    if (!fine && j >= until) g++, until += S.group;
    const __m512 s = fine ? _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(scales + g))
                          : _mm512_set1_ps(scales[g]);
    const uint64_t mine = SWIFT ? ~0ull : there(S, r, j, std::min(BLOCK, S.n - j));
    const int64_t count = SWIFT ? BLOCK : _mm_popcnt_u64(mine);
    __m512i codes = codes_avx512<BITS, SWIFT>(S, from, count);
    if (!SWIFT && S.mask) {  // the code of zero where nothing is kept
      __m512i zero = _mm512_set1_epi8(char(zeros ? zeros[g] : 1 << (BITS - 1)));
      if (zeros && fine) {
        uint32_t four = 0;
        std::memcpy(&four, zeros + g, std::min<int64_t>(fine, groups - g));
        zero = _mm512_shuffle_epi8(_mm512_set1_epi32(int(four)), bytes);
      }
      codes = _mm512_mask_expand_epi8(zero, mine, codes);
    }
    from += count, g += fine;
    const __m512i low = BITS == 8 ? _mm512_and_si512(codes, _mm512_set1_epi8(15)) : codes;
    const __m512bh first = FIRST(low), last = LAST(low);
    const __m512i high =
        _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
    const __m512bh more_first = FIRST(high), more_last = LAST(high);
    UNROLLED for (int t = 0; t < T; t++) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x + t * in.width + j);
      const __m512bh b = (__m512bh)_mm512_loadu_si512(x + t * in.width + j + 32);
      __m512 sum = _mm512_dpbf16_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), first, a), last, b);
      if (BITS == 8)
        sum = _mm512_fmadd_ps(
            _mm512_dpbf16_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), more_first, a), more_last, b),
            _mm512_set1_ps(16), sum);
      total[t] = _mm512_fmadd_ps(sum, s, total[t]);
    }
  }
  UNROLLED for (int t = 0; t < T; t++) sums[t] = _mm512_reduce_add_ps(total[t]);
}

template <int T>
void floats_of(const Coded& S, int64_t r, const CodesInput& in, float*, float* sums) {
  (swift(S, S.start(r), S.n) ? floats_avx512<T, true> : floats_avx512<T, false>)(S, r, in, sums);
}

template <int BITS, int T>
void halves_of(const Coded& S, int64_t r, const CodesInput& in, float* room, float* sums) {
  (swift(S, S.start(r), S.n) ? halves_avx512<BITS, T, true> : halves_avx512<BITS, T, false>)(
      S, r, in, room, sums);
}

template <int BITS>
CodesTimes times_of(bool halves, int slab) {
  switch (slab) {
    case 1: return halves ? halves_of<BITS, 1> : floats_of<1>;
    case 2: return halves ? halves_of<BITS, 2> : floats_of<2>;
    case 4: return halves ? halves_of<BITS, 4> : floats_of<4>;
    default: return halves ? halves_of<BITS, 8> : floats_of<8>;
  }
}

template <int BITS>
CodesRow row_of(int64_t size) {
  return size == 2 ? row_of<BITS, 2> : row_of<BITS, 4>;
}

#define OF_BITS(what, bits, ...)       \
  (bits == 2   ? what<2>(__VA_ARGS__)  \
   : bits == 3 ? what<3>(__VA_ARGS__)  \
   : bits == 4 ? what<4>(__VA_ARGS__)  \
   : bits == 5 ? what<5>(__VA_ARGS__)  \
   : bits == 6 ? what<6>(__VA_ARGS__)  \
   : bits == 7 ? what<7>(__VA_ARGS__)  \
               : what<8>(__VA_ARGS__))

#endif

// Has AVX-512 a way with these groups?
bool fast(const Coded& S, int set) {
#if defined(__x86_64__)
  return set >= WITH_AVX512 && (S.group % 16 == 0 || S.group >= S.n);
#else
  return false;
#endif
}

}  // namespace

// (Two halves of each code of 8 bits are worth it for one token only.)
bool codes_in_halves(const Coded& S, int set, int slab) {
  if (!fast(S, set) || (S.bits == 8 && slab > 1)) return false;
  return S.group % BLOCK == 0 || S.group == 16 || S.group == 32 || S.group >= S.n;
}

CodesTimes codes_times(const Coded& S, int set, bool halves, int slab) {
#if defined(__x86_64__)
  if (fast(S, set)) return OF_BITS(times_of, S.bits, halves, slab);
#endif
  switch (slab) {
    case 1: return times_portable<1>;
    case 2: return times_portable<2>;
    case 4: return times_portable<4>;
    default: return times_portable<8>;
  }
}

CodesRow codes_row(const Coded& S, int set, int64_t size) {
#if defined(__x86_64__)
  if (fast(S, set)) return OF_BITS(row_of, S.bits, size);
#endif
  return nullptr;
}

// x (tokens, n) in bfloat16 as `halves_avx512` reads it, blocks of 64 columns in eighths 0, 2, 4, 6,
// 1, 3, 5, 7; and its sums over groups.  `out` and `sums` are zero before.
void codes_input(const Coded& S, const uint16_t* x, int64_t tokens, uint16_t* out, float* sums) {
  const int64_t width = (S.n + BLOCK - 1) / BLOCK * BLOCK, wide = codes_sums(S);
  for (int64_t t = 0; t < tokens; t++, x += S.n, out += width, sums += wide)
    for (int64_t j = 0, g = 0; j < S.n; g++)
      for (const int64_t end = std::min(S.n, j + S.group); j < end;) {
        const int64_t eighth = j % BLOCK / 8, some = std::min(end, (j / 8 + 1) * 8) - j;
        uint16_t* const to = out + j / BLOCK * BLOCK + 8 * (eighth / 2 + eighth % 2 * 4) + j % 8;
        std::memcpy(to, x + j, 2 * some);
        for (int64_t i = 0; i < some; i++) sums[g] += of_bfloat16(x[j + i]);
        j += some;
      }
}

extern "C" {

// Rows of S from `top` on, in 2 (bfloat16) or 4 bytes (float32) a value, into `out` (rows, n).
void slr_codes_rows(int size, int set, int threads, const Coded* coded, int64_t top, int64_t rows,
                    char* out) {
  const Coded& S = *coded;
  const CodesRow unpack = codes_row(S, set, size);
  threads = int(std::clamp<int64_t>(rows * S.n / SHARE, 1, threads));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room(codes_room(S));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
      char* const to = out + size * i * S.n;
      if (unpack) {
        unpack(S, top + i, S.start(top + i), 0, S.n, to);
        continue;
      }
      row_portable(S, top + i, room.data());
      if (size == 4)
        std::memcpy(to, room.data(), 4 * S.n);
      else
        for (int64_t j = 0; j < S.n; j++) {
          const uint16_t half = bfloat16(room[j]);
          std::memcpy(to + 2 * j, &half, 2);
        }
    }
  }
}

}  // extern "C"
