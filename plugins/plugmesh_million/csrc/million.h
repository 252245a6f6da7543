// Product-quantised KV: what the files of this folder share. README.md is the card, pq.py the slow reference.
//
// A block holds 16 tokens: bytes [layer][K, V][kv head][subspace][16]. A subspace is two neighbouring dimensions, a code names one of its 256 centroids.
// Centroids are bfloat16. Everything is a function of a sequence's rows and positions: neither threads nor the encoder's timing change a bit.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace million {

constexpr int BLOCK = 16;        // tokens
constexpr int CENTROIDS = 256;
constexpr int TILE_BLOCKS = 32;  // closed blocks whose scores one pass computes
constexpr int TILE = TILE_BLOCKS * BLOCK;
constexpr int SPLIT_ROWS = 8;    // up to here a row's tiles are shared among the threads
constexpr int MAX_DIM = 256;
constexpr int MAX_GROUP = 16;    // query heads of a KV head

struct Shape {
  int32_t layers, heads, kv_heads, dim;  // dim: of a head, a multiple of 16
};

// Rows of one sequence in a step; the fields come from Python as int64.
struct Entry {
  int64_t row, num_rows, position;  // first row of the step, how many, and the first one's position
  int64_t blocks, slots;            // where its block numbers begin; where its open rows (addresses, 0 for none) begin, for block position / 16 on
  int64_t held;                     // bit i: slot i of block position / 16 is held as exact rows
  int64_t closed;                   // rows before this position are encoded within the step
};

struct Job {  // a row that the encoder's thread encodes
  int32_t block, slot;
  const uint16_t* open;
};

// Softmax over a part of the positions, not yet divided by the sum. Scores are in units of log2.
struct Partial {
  float max, sum;
  float out[MAX_DIM];
};

struct Codec {
  Shape s;
  int subspaces;
  uint8_t* blocks;
  size_t block_bytes;
  uint8_t* bad;                   // per block: something that is not finite was stored
  const uint16_t* centroids;      // bfloat16 [codebook][subspace][2][256]
  const int32_t* codebook;        // [layer][K, V][kv head]
  std::vector<float> reach;       // [codebook][subspace][2]: largest magnitude of a centroid's coordinate
  std::vector<uint8_t> planes;    // [codebook][subspace][2][low, high byte][256]: values of V for byte permutes
  bool is_async;

  std::vector<Entry> entries;
  std::vector<int32_t> block_table;
  std::vector<int64_t> slot_table;
  std::vector<int32_t> entry_of;  // row -> entry
  std::vector<int32_t> encode_rows;
  std::vector<Partial> partials;  // of steps of at most SPLIT_ROWS rows; per (row, kv head) from first_unit on, per query head of the group
  std::vector<int64_t> first_unit;

  // The encoder: a job is made by plan(), let go after the last layer's attention, and over before the next plan().
  std::thread worker;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Job> jobs;
  int layers_stored = 0;
  bool is_released = false, is_closing = false;
  int delay_us = 0;               // for tests
  int64_t num_encoded_async = 0, num_waits = 0;

  size_t row_offset(int layer, int part, int head) const {
    return ((size_t(layer) * 2 + part) * s.kv_heads + head) * size_t(subspaces) * BLOCK;
  }
  // An open block: bfloat16 [layer][K, V][16][kv head][dim].
  size_t open_offset(int layer, int part, int slot, int head) const {
    return (((size_t(layer) * 2 + part) * BLOCK + slot) * s.kv_heads + head) * size_t(s.dim);
  }
  const uint16_t* book(int layer, int part, int head) const {
    return centroids + size_t(codebook[(layer * 2 + part) * s.kv_heads + head]) * subspaces * 2 * CENTROIDS;
  }
};

// Parts of a row at this position before the last one, which is its open block.
inline int64_t tiles_of(int64_t position) { return (position / BLOCK + TILE_BLOCKS - 1) / TILE_BLOCKS; }

// encode.cpp
void round_row(const float* from, uint16_t* to, int dim);        // to bfloat16, to the nearest even
void widen_row(const uint16_t* from, float* to, int dim);
void widen_book(const uint16_t* book, float* c0, float* c1);     // one subspace
uint8_t nearest(float x0, float x1, const float* c0, const float* c1);
void decode_row(const Codec& c, int layer, int part, int head, int block, int slot, float* to);

// encoder.cpp
void drain(Codec& c);
void release(Codec& c);

}  // namespace million
