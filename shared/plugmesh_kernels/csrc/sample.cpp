// The sampler's rule on one row, without a sort of the vocabulary.
//
// Masses are exp((x - max) / T) in double, as in plugmesh_engine/sampler.py. All that top-k, top-p and min-p decide is one value: the lowest logit let in.
// It is found by histograms over a shrinking range (weights: 1 for top-k, the mass for top-p), so that ties are let in or left out together.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cpu.h"

namespace pm {
namespace {

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr int BINS = 512;
constexpr int SORTED = 256;  // candidates that are simply sorted
constexpr int CHUNK = 64;

struct Row {
  const SamplePasses& pass;
  float top;
  double inverse_t;
};

int bin_of(float x, float highest, float per_bin) { return std::min(BINS - 1, int((highest - x) * per_bin)); }

// The first value, from the highest down, at which the accumulated weight reaches `target`; the lowest when none does. Changes x.
float select(const Row& row, float* x, int n, double target, bool by_mass) {
  double above = 0.0;  // weight of values higher than all of x
  double mass[CHUNK];
  while (n > SORTED) {
    const auto [low, high] = std::minmax_element(x, x + n);
    const float lowest = *low, highest = *high;
    if (lowest == highest) return lowest;
    const float per_bin = float(BINS) / (highest - lowest);
    if (!(per_bin > 0.0f) || !(per_bin < std::numeric_limits<float>::max())) break;  // a range that floats cannot divide
    double weight[BINS] = {};
    for (int i = 0; i < n; i += CHUNK) {
      const int m = std::min(CHUNK, n - i);
      if (by_mass) row.pass.masses(x + i, m, row.top, row.inverse_t, NEG_INF, mass);
      for (int j = 0; j < m; ++j) weight[bin_of(x[i + j], highest, per_bin)] += by_mass ? mass[j] : 1.0;
    }
    int bin = 0;
    double sum = above;
    while (bin < BINS && !(sum + weight[bin] >= target)) sum += weight[bin++];
    if (bin == BINS) return lowest;
    above = sum;
    int kept = 0;
    for (int i = 0; i < n; ++i) {
      const float v = x[i];
      x[kept] = v;
      kept += bin_of(v, highest, per_bin) == bin;
    }
    if (kept == 0) return highest;  // only when the target is no more than what lies above
    if (kept == n) break;
    n = kept;
  }
  std::sort(x, x + n, std::greater<float>());
  for (int i = 0; i < n; i += CHUNK) {
    const int m = std::min(CHUNK, n - i);
    if (by_mass) row.pass.masses(x + i, m, row.top, row.inverse_t, NEG_INF, mass);
    for (int j = 0; j < m; ++j) {
      above += by_mass ? mass[j] : 1.0;
      if (above >= target) return x[i + j];
    }
  }
  return x[n - 1];
}

// The lowest float whose scaled value (x - top) / T is at least `limit`.
float floor_of(const Row& row, double limit) {
  const auto in = [&](float x) { return (double(x) - double(row.top)) * row.inverse_t >= limit; };
  float x = float(std::max(double(std::numeric_limits<float>::lowest()), double(row.top) + limit / row.inverse_t));
  for (int i = 0; i < 64 && !in(x) && x < row.top; ++i) x = std::nextafter(x, std::numeric_limits<float>::infinity());
  for (int i = 0; i < 64 && x > std::numeric_limits<float>::lowest(); ++i) {
    const float lower = std::nextafter(x, NEG_INF);
    if (!in(lower)) break;
    x = lower;
  }
  return x;
}

// The lowest logit that top-k, then top-p of what remains, then min-p let in.
float threshold(const Row& row, const float* logits, int n, const SampleParams& p, float* scratch) {
  float floor = NEG_INF;
  if (p.min_p > 0.0f) floor = floor_of(row, std::log(double(p.min_p)));
  const bool top_k = p.top_k > 0 && p.top_k < n, top_p = p.top_p < 1.0f;
  float nucleus = NEG_INF;
  if (top_k) {
    const int finite = row.pass.keep(logits, n, std::numeric_limits<float>::lowest(), scratch);
    if (p.top_k <= finite) nucleus = select(row, scratch, finite, double(p.top_k), false);
  }
  if (top_p) {
    const double total = row.pass.mass(logits, n, row.top, row.inverse_t, nucleus);
    // Values with less than this mass amount to less than 1 - top_p even if all were that light: the boundary lies above them. Half, for rounding.
    const double light = 0.5 * std::max(0.0, 1.0 - double(p.top_p)) * total / n;
    const float least = light > 0.0 ? floor_of(row, std::log(light)) : std::numeric_limits<float>::lowest();
    const int count = row.pass.keep(logits, n, std::max(nucleus, least), scratch);
    nucleus = std::max(nucleus, select(row, scratch, count, double(p.top_p) * total, true));
  }
  return std::max(floor, nucleus);
}

}  // namespace

int sample_row_with(const SamplePasses& pass, const float* logits, int n, const SampleParams& p, float* scratch) {
  float top;
  const int best = pass.ops->argmax(logits, n, &top);
  if (best < 0 || !(p.temperature > 0.0f)) return best;
  const Row row{pass, top, 1.0 / double(p.temperature)};
  const float floor = std::max(threshold(row, logits, n, p, scratch), std::numeric_limits<float>::lowest());

  // At most 1,024 partial sums, so that they fit on the stack whatever the vocabulary.
  constexpr int MAX_CHUNKS = 1024;
  const int chunk = std::max(CHUNK, round_up((n + MAX_CHUNKS - 1) / MAX_CHUNKS, CHUNK));
  double partial[MAX_CHUNKS];
  double total = 0.0;
  int chunks = 0;
  for (int i = 0; i < n; i += chunk) {
    partial[chunks] = pass.mass(logits + i, std::min(chunk, n - i), top, row.inverse_t, floor);
    total += partial[chunks++];
  }
  // Strictly below the total, so that rounding cannot lead past the last token with mass.
  const double target = std::min(p.u * total, std::nextafter(total, 0.0));
  double sum = 0.0;
  int last = best;  // the last token with mass, should a chunk's sum and the sum of its tokens differ in the last bit
  for (int c = 0; c < chunks; ++c) {
    if (sum + partial[c] <= target) {
      sum += partial[c];
      continue;
    }
    double run = sum, mass[CHUNK];
    const int end = std::min(n, (c + 1) * chunk);
    for (int i = c * chunk; i < end; i += CHUNK) {
      const int m = std::min(CHUNK, end - i);
      pass.masses(logits + i, m, top, row.inverse_t, floor, mass);
      for (int j = 0; j < m; ++j) {
        run += mass[j];
        if (mass[j] > 0.0) last = i + j;
        if (run > target) return i + j;
      }
    }
    return last;
  }
  return last;
}

void logprobs_row_with(const SamplePasses& pass, const float* logits, int n, int token, int num_top, float* token_logprob, int* top_ids,
                       float* top_values) {
  float top;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (pass.ops->argmax(logits, n, &top) < 0) {
    *token_logprob = nan;
    for (int i = 0; i < num_top; ++i) top_ids[i] = -1, top_values[i] = nan;
    return;
  }
  const double log_sum = std::log(pass.mass(logits, n, top, 1.0, std::numeric_limits<float>::lowest()));
  const auto logprob = [&](float x) { return float(double(x) - double(top) - log_sum); };
  *token_logprob = token >= 0 && token < n ? logprob(logits[token]) : nan;
  // Insertion into the best so far; a later id goes behind its equals.
  int have = 0;
  for (int i = 0; num_top > 0;) {
    if (have == num_top) i = pass.next_above(logits, i, n, top_values[num_top - 1]);
    if (i >= n) break;
    int at = have < num_top ? have++ : num_top - 1;
    for (; at > 0 && top_values[at - 1] < logits[i]; --at) {
      top_values[at] = top_values[at - 1];
      top_ids[at] = top_ids[at - 1];
    }
    top_values[at] = logits[i];
    top_ids[at] = i++;
  }
  for (int i = 0; i < num_top; ++i) {
    if (i >= have) top_ids[i] = -1;
    top_values[i] = i < have ? logprob(top_values[i]) : nan;
  }
}

const SamplePasses& sample_passes(const char* isa) {
  const std::string name(isa);
  kernels_for(name);  // throws when it cannot run here
  return *(name == "avx512" ? sample_avx512() : name == "avx2" ? sample_avx2() : sample_portable());
}

const SamplePasses& sample_passes() {
  const std::string& name = selected_isa();
  return *(name == "avx512" ? sample_avx512() : name == "avx2" ? sample_avx2() : sample_portable());
}

int sample_row(const float* logits, int n, const SampleParams& p, float* scratch) { return sample_row_with(sample_passes(), logits, n, p, scratch); }

void logprobs_row(const float* logits, int n, int token, int num_top, float* token_logprob, int* top_ids, float* top_values) {
  logprobs_row_with(sample_passes(), logits, n, token, num_top, token_logprob, top_ids, top_values);
}

int draw_allowed_with(const SamplePasses& pass, const float* logits, int n, const uint32_t* mask, float temperature, double u) {
  const SampleParams params{temperature, 0, 1.0f, 0.0f, u};
  const int words = (n + 31) / 32;
  thread_local std::vector<float> values, scratch;
  thread_local std::vector<int> ids;
  ids.clear();
  // Few allowed tokens are gathered first: a word of the mask without a bit stands for 32 tokens that need not be looked at.
  const size_t few = size_t(n) / 8;
  for (int w = 0; w < words && ids.size() <= few; ++w)
    for (uint32_t rest = mask[w]; rest != 0; rest &= rest - 1) {
      const int id = w * 32 + __builtin_ctz(rest);
      if (id < n) ids.push_back(id);
    }
  if (ids.size() <= few) {
    values.resize(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) values[i] = logits[ids[i]];
    scratch.resize(std::max<size_t>(ids.size(), 1));
    const int at = ids.empty() ? -1 : sample_row_with(pass, values.data(), int(ids.size()), params, scratch.data());
    return at < 0 ? -1 : ids[size_t(at)];
  }
  values.assign(logits, logits + n);
  scratch.resize(size_t(n));
  pass.forbid(values.data(), n, mask);
  return sample_row_with(pass, values.data(), n, params, scratch.data());
}

}  // namespace pm
