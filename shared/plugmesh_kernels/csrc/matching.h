// Checks drawn tokens against matchers of grammars, without Python.
//
// A matcher is foreign code, so a worker of a pool asks it: whoever waits gives up on one that hangs, and on its thread with it.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace pm {

// What a capsule named "plugmesh.matcher.v1" holds; its context is the `state`. Called by one thread at a time, not always the same. Below 0: it failed.
enum MatcherOp : int {
  MATCH_ACCEPT = 0,    // goes on by `token`: 1; it is not allowed and nothing changed: 0
  MATCH_STANDING = 1,  // bit 0: the output may end here; bit 1: an end token was accepted
  MATCH_FILL = 2,      // writes the whole mask, bit j % 32 of word j / 32 for token j: 1; every token is allowed: 0
  MATCH_FORCED = 3,    // whether any text must come next whatever is chosen
};
using MatcherFn = int (*)(void* state, int op, int32_t token, uint32_t* mask);

// Bits of what is told of a token.
enum MatchFlag : uint8_t {
  MATCH_REDRAWN = 1,     // it was refused; another was drawn from what is allowed
  MATCH_COMPLETED = 2,   // the output may end behind it
  MATCH_TERMINATED = 4,  // it was an end token
  MATCH_IS_FORCED = 8,   // asked for, and text is forced behind it
  MATCH_FAILED = 16,     // the matcher failed or contradicted itself
  MATCH_NOTHING = 32,    // no allowed token has a finite logit
};

// Logits that are not written out.
class KeptLogits {
 public:
  virtual ~KeptLogits() = default;
  virtual bool is_kept(int row) const = 0;
  // The largest among the tokens with a bit in `mask`, the first of equals; -1 when none is finite. The same as of the logits in full.
  virtual int best_allowed(int row, const uint32_t* mask) = 0;
};

struct MatchRow {  // one sequence
  MatcherFn call;
  void* state;
  uint64_t seed, sequence;  // of its second draws
  float temperature;
  bool asks_forced;  // somebody wants to know if text is forced behind a token
  std::vector<uint32_t> mask;
};

struct MatchPart {  // its part of one step
  MatchRow* row;
  const float* logits;  // (vocab,); nullptr: row `kept_row` of the job's `kept`
  int kept_row;
  uint64_t position;
  int32_t token;  // in: drawn; out: accepted
  uint8_t flags;  // out
};

class MatchJob : public SideJob {
 public:
  std::vector<MatchPart> parts;
  int vocab = 0;
  KeptLogits* kept = nullptr;
  void run() override;
  int progress() const override { return at_; }  // the part being done, -1 before the first

 private:
  void check(MatchPart& part);
  std::atomic<int> at_{-1};
};

// A number in [0, 1) for (seed, sequence, position), as plugmesh_engine/sampler.py has it.
double match_uniform(uint64_t seed, uint64_t sequence, uint64_t position);

}  // namespace pm
