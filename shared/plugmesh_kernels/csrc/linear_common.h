// What the linear kernels of every instruction set share. No standard library templates in here: this header is compiled for several instruction sets,
// and an inline function that the linker keeps from the avx512 file would not run on an older CPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace pm {

// Pieces of which the largest magnitude is below this count as zero: 127 / max stays finite, and no scale is denormal (some processes flush those).
constexpr float QUANT_TINY = 1e-30f;

// Tokens that are worked on at a time; their packed activations stay in L1 (narrow K) or L2.
constexpr int TILE_TOKENS = 64;

// A piece (64 values) of one token's quantised activations with all that its product needs, so that a kernel follows one pointer. Rows of an Input whose
// stride is a multiple of 4096 would all fall into the same sets of the L1 cache.
struct PackedPiece {
  int8_t q[INPUT_GROUP];
  float scale;
  union {
    float sum[2];     // Q4_1
    int32_t init[2];  // Q8_0
  };
  int32_t unused;
};
static_assert(sizeof(PackedPiece) == 80, "a multiple of 16 bytes");

// The same, at most, where activations are widened to 16 bits.
constexpr size_t TOKEN_PIECE_BYTES = 144;

}  // namespace pm
