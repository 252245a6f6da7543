// What the tests hand to the executor as capsules: plain loops.
#include <cmath>
#include <cstdint>
#include <vector>

// context: {float* rows (layers, 2, capacity, kv_heads, d), int64_t* {heads, kv_heads, d, capacity, first position}}
extern "C" void attention(void* context, int layer, const float* q, const float* k, const float* v, int t, float* out, int thread, int num_threads,
                          void (*barrier)(void*), void* barrier_context) {
  const auto* fields = static_cast<void**>(context);
  auto* rows = static_cast<float*>(fields[0]);
  const auto* facts = static_cast<const int64_t*>(fields[1]);
  const int64_t heads = facts[0], kv_heads = facts[1], d = facts[2], capacity = facts[3], first = facts[4], width = kv_heads * d;
  float* keys = rows + layer * 2 * capacity * width;
  float* values = keys + capacity * width;
  for (int64_t r = thread; r < t; r += num_threads)
    for (int64_t i = 0; i < width; ++i) {
      keys[(first + r) * width + i] = k[r * width + i];
      values[(first + r) * width + i] = v[r * width + i];
    }
  barrier(barrier_context);  // others' keys are read from here on
  std::vector<float> scores;
  for (int64_t unit = thread; unit < t * heads; unit += num_threads) {
    const int64_t r = unit / heads, h = unit % heads, g = h / (heads / kv_heads), length = first + r + 1;
    const float* query = q + (r * heads + h) * d;
    float* to = out + (r * heads + h) * d;
    scores.assign(length, 0.0f);
    float max = -INFINITY, sum = 0.0f;
    for (int64_t p = 0; p < length; ++p) {
      for (int64_t i = 0; i < d; ++i) scores[p] += query[i] * keys[p * width + g * d + i];
      scores[p] /= std::sqrt(float(d));
      max = std::fmax(max, scores[p]);
    }
    for (int64_t i = 0; i < d; ++i) to[i] = 0.0f;
    for (int64_t p = 0; p < length; ++p) {
      const float weight = std::exp(scores[p] - max);
      sum += weight;
      for (int64_t i = 0; i < d; ++i) to[i] += weight * values[p * width + g * d + i];
    }
    for (int64_t i = 0; i < d; ++i) to[i] /= sum;
  }
}

// context: float w (n, k)
extern "C" void linear(void* context, const float* x, int t, int k, float* y, int n, int thread, int num_threads) {
  const auto* w = static_cast<const float*>(context);
  for (int i = int(int64_t(n) * thread / num_threads); i < int(int64_t(n) * (thread + 1) / num_threads); ++i)
    for (int r = 0; r < t; ++r) {
      float sum = 0.0f;
      for (int j = 0; j < k; ++j) sum += w[int64_t(i) * k + j] * x[int64_t(r) * k + j];
      y[int64_t(r) * n + i] = sum;
    }
}

// context: {float* buffer (n), const float* all (layers + 1, n), int64_t n}; each thread copies its share of the layer's floats.
extern "C" void before_layer(void* context, int layer, int thread, int num_threads) {
  const auto* fields = static_cast<void**>(context);
  auto* to = static_cast<float*>(fields[0]);
  const auto* all = static_cast<const float*>(fields[1]);
  const int64_t n = reinterpret_cast<int64_t>(fields[2]);
  for (int64_t i = n * thread / num_threads; i < n * (thread + 1) / num_threads; ++i) to[i] = all[layer * n + i];
}

// context: {const float* table (vocab, hidden), int64_t hidden}
extern "C" void embedding(void* context, const int32_t* tokens, int t, float* x, int thread, int num_threads) {
  const auto* fields = static_cast<void**>(context);
  const auto* table = static_cast<const float*>(fields[0]);
  const int64_t hidden = reinterpret_cast<int64_t>(fields[1]);
  for (int r = thread; r < t; r += num_threads)
    for (int64_t i = 0; i < hidden; ++i) x[r * hidden + i] = table[tokens[r] * hidden + i];
}
