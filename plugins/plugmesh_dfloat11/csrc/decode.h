// A container as plugmesh_dfloat11/container.py describes it, and its reader.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int64_t CHUNK = 1024;

struct Container {
  const uint32_t* offsets;
  const uint8_t* codes;
  const uint8_t* rest;    // sign and mantissa
  const uint64_t* table;  // 2048 entries: six symbols, bits, number of symbols
  int64_t num_values;
  int64_t num_chunks() const { return (num_values + CHUNK - 1) / CHUNK; }
};

// Values of the chunks first to last; the last one may be shorter.
void decode_chunks(const Container& c, int64_t first, int64_t last, uint16_t* out);

// Memory of a thread that grows and is used again: starts at a multiple of 64.
template <class T>
T* scratch(std::vector<uint8_t>& room, size_t count) {
  if (room.size() < count * sizeof(T) + 64) room.resize(count * sizeof(T) + 64);
  const auto address = reinterpret_cast<uintptr_t>(room.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}
