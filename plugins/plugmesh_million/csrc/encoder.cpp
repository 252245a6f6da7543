// Opening and closing, the plan of a step, and the thread that encodes what no row of the step reads as codes.
#include <chrono>
#include <cmath>
#include <cstring>

#include "million.h"

namespace million {
namespace {

// Encodes the rows of `jobs` in the first `layers` layers. A job's rows were rounded when they were stored.
void encode(Codec& c, const std::vector<Job>& jobs, int layers) {
  alignas(64) float c0[CENTROIDS], c1[CENTROIDS];
  for (int layer = 0; layer < layers; ++layer)
    for (int part = 0; part < 2; ++part)
      for (int head = 0; head < c.s.kv_heads; ++head) {
        const uint16_t* book = c.book(layer, part, head);
        for (int m = 0; m < c.subspaces; ++m) {
          widen_book(book + size_t(m) * 2 * CENTROIDS, c0, c1);
          for (const Job& job : jobs) {
            float x[2];
            widen_row(job.open + c.open_offset(layer, part, job.slot, head) + 2 * m, x, 2);
            c.blocks[size_t(job.block) * c.block_bytes + c.row_offset(layer, part, head) + m * BLOCK + job.slot] = nearest(x[0], x[1], c0, c1);
          }
        }
      }
}

void work(Codec& c) {
  std::unique_lock<std::mutex> lock(c.mutex);
  while (true) {
    c.changed.wait(lock, [&] { return c.is_closing || c.is_released; });
    if (c.is_closing) return;
    const int layers = c.layers_stored;
    lock.unlock();  // plan() waits for is_released to fall before it touches the jobs
    if (c.delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(c.delay_us));
    encode(c, c.jobs, layers);
    lock.lock();
    c.num_encoded_async += int64_t(c.jobs.size());
    c.jobs.clear();
    c.layers_stored = 0;
    c.is_released = false;
    c.changed.notify_all();
  }
}

}  // namespace

void release(Codec& c) {
  if (c.jobs.empty()) return;
  std::lock_guard<std::mutex> lock(c.mutex);
  c.is_released = true;
  c.changed.notify_all();
}

// After this all codes are final, also those of a step that stopped half-way: the layers that it stored.
void drain(Codec& c) {
  std::unique_lock<std::mutex> lock(c.mutex);
  if (c.is_released) ++c.num_waits;
  c.changed.wait(lock, [&] { return !c.is_released; });
  if (c.layers_stored > 0) encode(c, c.jobs, c.layers_stored);
  c.jobs.clear();
  c.layers_stored = 0;
}

}  // namespace million

using namespace million;

// Whether this library was compiled for a processor with the byte permutes and bfloat16 products that attention.cpp is made of.
extern "C" int million_supported() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

extern "C" Codec* million_open(const int32_t* shape, uint8_t* blocks, int64_t block_bytes, uint8_t* bad, const uint16_t* centroids, int32_t num_codebooks,
                               const int32_t* codebook, int32_t is_async) {
  auto* c = new Codec;
  c->s = {shape[0], shape[1], shape[2], shape[3]};
  c->subspaces = c->s.dim / 2;
  c->blocks = blocks;
  c->block_bytes = size_t(block_bytes);
  c->bad = bad;
  c->centroids = centroids;
  c->codebook = codebook;
  c->is_async = is_async != 0;
  const size_t rows = size_t(num_codebooks) * c->subspaces * 2;
  c->reach.assign(rows, 0.0f);
  c->planes.resize(rows * 2 * CENTROIDS);
  for (size_t row = 0; row < rows; ++row)
    for (int i = 0; i < CENTROIDS; ++i) {
      const uint16_t value = centroids[row * CENTROIDS + i];
      float f;
      widen_row(&value, &f, 1);
      c->reach[row] = std::fmax(c->reach[row], std::fabs(f));
      c->planes[row * 2 * CENTROIDS + i] = uint8_t(value);
      c->planes[row * 2 * CENTROIDS + CENTROIDS + i] = uint8_t(value >> 8);
    }
  if (c->is_async) c->worker = std::thread([c] { work(*c); });
  return c;
}

extern "C" void million_close(Codec* c) {
  if (c->worker.joinable()) {
    drain(*c);
    {
      std::lock_guard<std::mutex> lock(c->mutex);
      c->is_closing = true;
    }
    c->changed.notify_all();
    c->worker.join();
  }
  delete c;
}

extern "C" void million_drain(Codec* c) { drain(*c); }
extern "C" void million_set_delay(Codec* c, int32_t delay_us) { c->delay_us = delay_us; }

// counts: {rows that the thread encoded, times that somebody had to wait for it}
extern "C" void million_counts(Codec* c, int64_t* counts) {
  std::lock_guard<std::mutex> lock(c->mutex);
  counts[0] = c->num_encoded_async;
  counts[1] = c->num_waits;
}

// entries: int64 (n, 7), the fields of Entry; the tables are copied.
extern "C" void million_plan(Codec* c, const int64_t* entries, int32_t n, const int32_t* blocks, int64_t num_blocks, const int64_t* slots, int64_t num_slots) {
  drain(*c);
  c->entries.resize(size_t(n));
  std::memcpy(static_cast<void*>(c->entries.data()), entries, size_t(n) * sizeof(Entry));
  c->block_table.assign(blocks, blocks + num_blocks);
  c->slot_table.assign(slots, slots + num_slots);
  c->entry_of.clear();
  c->encode_rows.clear();
  for (int32_t i = 0; i < n; ++i) {
    const Entry& e = c->entries[size_t(i)];
    for (int64_t r = 0; r < e.num_rows; ++r) {
      const int64_t position = e.position + r;
      c->entry_of.push_back(i);
      if (!c->is_async || position < e.closed) {
        c->encode_rows.push_back(int32_t(e.row + r));
        continue;
      }
      const int64_t open = c->slot_table[size_t(e.slots + position / BLOCK - e.position / BLOCK)];
      c->jobs.push_back({c->block_table[size_t(e.blocks + position / BLOCK)], int32_t(position % BLOCK), reinterpret_cast<const uint16_t*>(open)});
    }
  }
  c->first_unit.assign(1, 0);
  const int64_t heads = c->s.kv_heads, pairs = c->entry_of.size() <= size_t(SPLIT_ROWS) ? int64_t(c->entry_of.size()) * heads : 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const Entry& e = c->entries[size_t(c->entry_of[size_t(i / heads)])];
    c->first_unit.push_back(c->first_unit.back() + tiles_of(e.position + i / heads - e.row) + 1);
  }
  c->partials.resize(size_t(c->first_unit.back()) * size_t(c->s.heads / heads));
}
