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

// Tokens that are worked on at a time; their accumulators stay in L1.
constexpr int TILE_TOKENS = 64;

// The most that a kernel keeps of a QuantPiece in an order of its own (AVX2 widens to 16 bits).
constexpr size_t TOKEN_PIECE_BYTES = 144;

}  // namespace pm
