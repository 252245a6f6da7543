#include "matching.h"

#include "sample.h"

namespace pm {

void MatchJob::run() {
  for (size_t i = 0; i < parts.size(); ++i) {
    at_ = int(i);  // before the look: whoever gives up reads it afterwards, so one of both sees the other, and no part is done twice
    if (is_abandoned()) return;
    check(parts[i]);
  }
}

void MatchJob::check(MatchPart& p) {
  MatchRow& row = *p.row;
  int got = row.call(row.state, MATCH_ACCEPT, p.token, nullptr);
  if (got == 0) {
    got = row.call(row.state, MATCH_FILL, 0, row.mask.data());
    if (is_abandoned()) return;
    if (got != 1) {  // it failed, or says that every token is allowed
      p.flags = MATCH_FAILED;
      return;
    }
    if (p.logits == nullptr)
      p.token = kept->best_allowed(p.kept_row, row.mask.data());
    else
      p.token = draw_allowed_with(sample_passes(), p.logits, vocab, row.mask.data(), row.temperature,
                                  row.temperature > 0 ? match_uniform(row.seed, row.sequence, p.position) : 0.0);
    if (p.token < 0) {
      p.flags = MATCH_NOTHING;
      return;
    }
    p.flags = MATCH_REDRAWN;
    got = row.call(row.state, MATCH_ACCEPT, p.token, nullptr);
  }
  const int standing = got == 1 ? row.call(row.state, MATCH_STANDING, 0, nullptr) : -1;
  if (standing < 0) {
    p.flags = MATCH_FAILED;
    return;
  }
  if (standing & 1) p.flags |= MATCH_COMPLETED;
  if (standing & 2) p.flags |= MATCH_TERMINATED;
  if (standing != 0 || !row.asks_forced) return;
  const int forced = row.call(row.state, MATCH_FORCED, 0, nullptr);
  if (forced < 0) p.flags = MATCH_FAILED;
  if (forced > 0) p.flags |= MATCH_IS_FORCED;
}

double match_uniform(uint64_t seed, uint64_t sequence, uint64_t position) {
  uint64_t h = 0;
  for (uint64_t word : {seed, sequence, position}) {
    h = (h ^ word) + 0x9E3779B97F4A7C15ull;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
    h ^= h >> 31;
  }
  return double(h >> 11) * 0x1p-53;
}

}  // namespace pm
