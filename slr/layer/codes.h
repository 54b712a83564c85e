// A matrix of codes, and what native.cpp wants of one; see codes.cpp.  And a layer, as operators.cpp
// hands it over.

#pragma once

#include <algorithm>
#include <cstdint>

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

// Tokens as `CodesTimes` reads them: (tokens, width), zero from column n on.
struct CodesInput {
  const void* x;  // float32; or bfloat16 in the order of `codes_input`
  const float* sums;  // then of x over each group, (tokens, groups rounded up to 16)
  int64_t width;
};

// Row r of S times a slab of tokens: sums[t] = Σ S[r, c] x[t, c].  `room` is for `codes_room` floats.
using CodesTimes = void (*)(const Coded&, int64_t r, const CodesInput&, float* room, float* sums);
// Columns of a row of S, `from` on in the codes; returns where those behind them begin.
using CodesRow = int64_t (*)(const Coded&, int64_t r, int64_t from, int64_t column, int64_t columns,
                             char* out);

bool codes_in_halves(const Coded& S, int set, int slab);  // is x to be in bfloat16?
CodesTimes codes_times(const Coded& S, int set, bool halves, int slab);
CodesRow codes_row(const Coded& S, int set, int64_t size);
void codes_input(const Coded& S, const uint16_t* x, int64_t tokens, uint16_t* out, float* sums);
inline int64_t codes_room(const Coded& S) { return 2 * S.n + S.groups() + 64; }
inline int64_t codes_sums(const Coded& S) { return (S.groups() + 15) / 16 * 16; }

// y = S x + B (A x) + b.
struct Part {
  int64_t m, k;
  const char* values;     // of S, `count` of them, in order
  int64_t count;
  const uint8_t* bits;    // of the mask, (m, n), lowest first
  const int64_t* starts;  // where the values of each row begin, or null:
  int64_t each;           // as many in every row
  const char *B, *A, *bias;
  const Coded* coded;     // S, if it is of codes: then the five above are not read
};
