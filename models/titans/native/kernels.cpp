// What one token costs in arithmetic, without what it costs to call an operation: products of a few rows with large
// matrices, whole runs of a body's layers, and a linear memory's reads and writes. For x86-64 processors that multiply
// bfloat16 (AVX-512 BF16, VNNI).
//
// Weights lie in blocks of 16 outputs, and in a block in groups of 32 inputs, so that a product reads them from the
// first byte to the last. Three kinds:
//
//     FOUR     256 bytes of codes, then 16 steps and 16 lowest levels in half precision: w = code * step + lowest
//     EIGHT    512 bytes of codes, then 16 steps in float32: w = (code - 128) * step
//     SIXTEEN  1024 bytes: pairs of inputs in bfloat16
//
// Codes meet inputs in fixed point, 16 bits with one scale a row: two bytes, each of which is multiplied with four codes
// at once (VNNI). A group's sum is exact. By its norm a row is nearer so than in bfloat16: fifty times where it is
// normally distributed, and where one of 1,536 inputs is far above all others, which is the worst, still four times.
//
// A product's rows, and a session's tokens, are computed each as it would be alone: how many there are changes no bit.
//
// Threads: a team's workers sleep between calls; inside one they meet at barriers, where they spin, since a phase
// takes microseconds, and after a while yield, since a core may be shared. A team runs one call at a time.
//
// Shapes: B sessions · T tokens · R rows, B T where tokens are meant · N outputs · K inputs · D hidden · H query heads ·
// G kv heads · E head dim · W window · P persistent. Of a memory: H heads · K key dim · F floats of a key as the
// memory sees it · V value dim · C tokens before its own that a query is made of · S tokens of a chunk.

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int BLOCK = 16;
constexpr int GROUP = 32;
constexpr int SPINS = 4'000;
constexpr float LARGEST = 127 * 256;   // of what has a high and a low byte
constexpr float SMALLEST = 1e-30f;     // rows below it are 0: their scale has no inverse

enum Kind : int64_t { FOUR = 4, EIGHT = 8, SIXTEEN = 16 };

struct Matrix {
    int64_t kind, num_outputs, num_inputs;
    const uint8_t *data;

    int64_t group_bytes() const { return kind == FOUR ? 320 : kind == EIGHT ? 576 : 1024; }
    const uint8_t *block(int64_t b) const { return data + b * (num_inputs / GROUP) * group_bytes(); }
};

struct Layer {
    const float *attention_norm, *mlp_norm;         // [D]
    Matrix qkv, out, gate_up, down;
    const uint16_t *persistent_keys, *persistent_values;  // [P, G, E] bfloat16
};

struct Body {
    int64_t size, num_heads, num_kv_heads, head_dim, inner, window, num_persistent;
    double theta, eps;
};

struct Memory {  // a linear memory, and what tokens ask and write it through
    int64_t size, num_heads, key_dim, value_dim, reach, gate_reach, products, chunk, forgets, has_momentum;
    double eps, most_momentum;
    const float *norm, *center;                       // [D]
    const float *query_taps, *key_taps, *value_taps;  // [C + 1, H, K] and, of values, [C + 1, H, V]; the last: its own
    const float *gate_taps;                           // [gate_reach + 1, D]
    const float *gates, *gates_bias;                  // [gates, H, D] and [gates, H]: theta, alpha, eta
    const float *out_gate_bias;                       // [H, V]
    Matrix query, key, value, out_gate, out;          // of kind SIXTEEN

    int64_t features() const { return key_dim * std::max<int64_t>(1, products); }
};

// ---- threads

class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}

    void wait() {
        if (count_ == 1) return;
        const unsigned phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < SPINS) _mm_pause();
            else sched_yield();
        }
    }

  private:
    const int count_;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
};

struct Share {  // of a range that a team splits
    int64_t begin, end;
};

class Team {
  public:
    explicit Team(int size) : size(size), barrier(size) {
        for (int i = 1; i < size; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Team() {
        call_ = nullptr;
        wake();
        for (auto &worker : workers_) worker.join();
    }

    template <class F> void run(F &&call) {
        const std::lock_guard<std::mutex> one(mutex_);
        call_ = [](void *context, int index) { (*static_cast<F *>(context))(index); };
        context_ = &call;
        wake();
        call(0);
        barrier.wait();  // nobody is inside any more
    }

    Share share(int64_t count, int index) const { return {count * index / size, count * (index + 1) / size}; }

    const int size;
    Barrier barrier;

  private:
    void wake() {
        if (size == 1) return;
        turn_.fetch_add(1, std::memory_order_release);
        turn_.notify_all();
    }

    void work(int index) {
        for (unsigned seen = 0;; ) {
            turn_.wait(seen, std::memory_order_acquire);
            ++seen;
            if (call_ == nullptr) return;
            call_(context_, index);
            barrier.wait();
        }
    }

    std::mutex mutex_;
    std::atomic<unsigned> turn_{0};
    void (*call_)(void *, int) = nullptr;
    void *context_ = nullptr;
    std::vector<std::thread> workers_;
};

// ---- numbers

__m512 widen(const uint16_t *x) {  // 16 bfloat16
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

void narrow(__m512 x, uint16_t *to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

__m512bh pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }

__m512 half(const uint8_t *x) {  // 16 of half precision
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
}

__m512 rounded(__m512 x) {  // to bfloat16 and back
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))), 16));
}

__m512 exponential(__m512 x) {  // e^x within 2e-7: 2^n 2^f, |f| <= 1/2
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 y = _mm512_mul_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(y, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// ---- products

struct Inputs {  // rows of a product, as matrices of codes take them, of bfloat16, or both
    bool codes = false, pairs = false;
    std::vector<int8_t> high, low;    // [R, K]: x = (256 high + low) * scale
    std::vector<float> scales;        // [R]
    std::vector<int32_t> sums;        // [R, K / 32], of 256 high + low
    std::vector<uint16_t> rounded;    // [R, K] bfloat16

    void resize(int64_t rows, int64_t most_inputs) {
        high.resize(codes ? rows * most_inputs : 0);
        low.resize(high.size());
        scales.resize(codes ? rows : 0);
        sums.resize(high.size() / GROUP);
        rounded.resize(pairs ? rows * most_inputs : 0);
    }

    void take(int64_t row, const float *x, int64_t num_inputs) {
        if (codes) fix(row, x, num_inputs);
        if (pairs)
            for (int64_t k = 0; k < num_inputs; k += 16)
                narrow(_mm512_loadu_ps(x + k), rounded.data() + row * num_inputs + k);
    }

  private:
    void fix(int64_t row, const float *x, int64_t num_inputs) {
        __m512 most = _mm512_setzero_ps();
        __mmask16 no_numbers = 0;
        for (int64_t k = 0; k < num_inputs; k += 16) {
            const __m512 y = _mm512_loadu_ps(x + k);
            most = _mm512_max_ps(most, _mm512_abs_ps(y));
            no_numbers |= _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
        }
        const float largest = _mm512_reduce_max_ps(most);
        const bool finite = !no_numbers && largest <= std::numeric_limits<float>::max();
        const __m512 by = _mm512_set1_ps(finite && largest > SMALLEST ? LARGEST / largest : 0.0f);
        scales[row] = finite ? largest / LARGEST : std::numeric_limits<float>::quiet_NaN();
        const auto half_group = [&](int64_t k) {
            const __m512i all = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), by));
            const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(all, _mm512_set1_epi32(128)), 8);
            const __m512i lower = _mm512_sub_epi32(all, _mm512_slli_epi32(upper, 8));
            const int64_t at = row * num_inputs + k;
            _mm_storeu_si128(reinterpret_cast<__m128i *>(high.data() + at), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(low.data() + at), _mm512_cvtepi32_epi8(lower));
            return all;
        };
        for (int64_t k = 0; k < num_inputs; k += GROUP)
            sums[(row * num_inputs + k) / GROUP] =
                _mm512_reduce_add_epi32(_mm512_add_epi32(half_group(k), half_group(k + 16)));
    }
};

template <class T> __m512i broadcast(const T *x) {  // four bytes
    int word;
    std::memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

// Of R rows and B blocks, what one group adds: four codes of each output at a time with four inputs of each row.
template <int R, int B> struct Sums {
    __m512i high[R][B], low[R][B];

    Sums() {
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) high[r][b] = low[r][b] = _mm512_setzero_si512();
    }

    void add(const __m512i (&codes)[B], const Inputs &x, int64_t at, int64_t num_inputs) {
        for (int r = 0; r < R; ++r) {
            const __m512i upper = broadcast(x.high.data() + r * num_inputs + at);
            const __m512i lower = broadcast(x.low.data() + r * num_inputs + at);
            for (int b = 0; b < B; ++b) {
                high[r][b] = _mm512_dpbusd_epi32(high[r][b], codes[b], upper);
                low[r][b] = _mm512_dpbusd_epi32(low[r][b], codes[b], lower);
            }
        }
    }

    __m512i whole(int r, int b) const { return _mm512_add_epi32(_mm512_slli_epi32(high[r][b], 8), low[r][b]); }
};

template <int R, int B>
void four(const Matrix &m, int64_t block, const Inputs &x, int64_t row, __m512 (&total)[R][B]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int64_t num_groups = m.num_inputs / GROUP;
    for (int64_t g = 0; g < num_groups; ++g) {
        Sums<R, B> sums;
        const uint8_t *at[B];
        for (int b = 0; b < B; ++b) at[b] = m.block(block + b) + g * 320;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m512i codes[B];
            for (int b = 0; b < B; ++b) {
                const __m512i both = _mm512_loadu_si512(at[b] + 64 * (i / 2));
                codes[b] = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(both, 4) : both, nibble);
            }
            sums.add(codes, x, row * m.num_inputs + g * GROUP + 4 * i, m.num_inputs);
        }
        for (int b = 0; b < B; ++b) {
            const __m512 step = half(at[b] + 256), lowest = half(at[b] + 288);
            for (int r = 0; r < R; ++r) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(x.sums[(row + r) * num_groups + g]));
                total[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.whole(r, b)), step, total[r][b]);
                total[r][b] = _mm512_fmadd_ps(lowest, sum, total[r][b]);
            }
        }
    }
}

template <int R, int B>
void eight(const Matrix &m, int64_t block, const Inputs &x, int64_t row, __m512 (&total)[R][B]) {
    const int64_t num_groups = m.num_inputs / GROUP;
    for (int64_t g = 0; g < num_groups; ++g) {
        Sums<R, B> sums;
        const uint8_t *at[B];
        for (int b = 0; b < B; ++b) at[b] = m.block(block + b) + g * 576;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m512i codes[B];
            for (int b = 0; b < B; ++b) codes[b] = _mm512_loadu_si512(at[b] + 64 * i);
            sums.add(codes, x, row * m.num_inputs + g * GROUP + 4 * i, m.num_inputs);
        }
        for (int r = 0; r < R; ++r) {
            const __m512i shift = _mm512_set1_epi32(128 * x.sums[(row + r) * num_groups + g]);
            for (int b = 0; b < B; ++b) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums.whole(r, b), shift));
                total[r][b] = _mm512_fmadd_ps(sum, _mm512_loadu_ps(at[b] + 512), total[r][b]);
            }
        }
    }
}

template <int R, int B>
void sixteen(const Matrix &m, int64_t block, const Inputs &x, int64_t row, __m512 (&total)[R][B]) {
    const uint8_t *at[B];
    for (int b = 0; b < B; ++b) at[b] = m.block(block + b);
    for (int64_t k = 0; k < m.num_inputs; k += 2)
        for (int r = 0; r < R; ++r) {
            const __m512bh v = pairs(broadcast(x.rounded.data() + (row + r) * m.num_inputs + k));
            for (int b = 0; b < B; ++b)
                total[r][b] = _mm512_dpbf16_ps(total[r][b], pairs(_mm512_loadu_si512(at[b] + 32 * k)), v);
        }
}

template <int R, int B, class Take>
void tile(const Matrix &m, int64_t block, const Inputs &x, int64_t row, Take &&take) {
    __m512 total[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) total[r][b] = _mm512_setzero_ps();
    if (m.kind == FOUR) four<R, B>(m, block, x, row, total);
    else if (m.kind == EIGHT) eight<R, B>(m, block, x, row, total);
    else sixteen<R, B>(m, block, x, row, total);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            const __m512 scale = _mm512_set1_ps(m.kind == SIXTEEN ? 1.0f : x.scales[row + r]);
            take(row + r, (block + b) * BLOCK, _mm512_mul_ps(total[r][b], scale));
        }
}

// The outputs of some blocks for all rows; `take` is given a row, the first of 16 outputs and these.
template <int B, class Take>
void some_blocks(const Matrix &m, int64_t block, const Inputs &x, int64_t rows, Take &&take) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
        if constexpr (B == 4) {
            tile<4, 2>(m, block, x, row, take);
            tile<4, 2>(m, block + 2, x, row, take);
        } else {
            tile<4, B>(m, block, x, row, take);
        }
    }
    for (; row + 2 <= rows; row += 2) tile<2, B>(m, block, x, row, take);
    for (; row < rows; ++row) tile<1, B>(m, block, x, row, take);
}

template <class Take>
void multiply(const Matrix &m, Share blocks, const Inputs &x, int64_t rows, Take &&take) {
    int64_t block = blocks.begin;
    for (; block + 4 <= blocks.end; block += 4) some_blocks<4>(m, block, x, rows, take);
    for (; block + 2 <= blocks.end; block += 2) some_blocks<2>(m, block, x, rows, take);
    for (; block < blocks.end; ++block) some_blocks<1>(m, block, x, rows, take);
}

__m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// ---- layers

void norm(const float *h, const float *weight, double eps, int64_t size, float *to) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_loadu_ps(h + i);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(h + i), _mm512_set1_ps(scale));
        _mm512_storeu_ps(to + i, _mm512_mul_ps(x, _mm512_loadu_ps(weight + i)));
    }
}

struct Turn {  // of one row: by its position, and by its distance from the persistent tokens
    std::vector<float> cos, sin, far_cos, far_sin;  // [E / 2]

    Turn(int64_t position, const Body &body) {
        const int64_t half_dim = body.head_dim / 2, back = std::min(position + 1, body.window);
        for (int64_t i = 0; i < half_dim; ++i) {
            const double step = std::pow(body.theta, -2.0 * i / body.head_dim);
            cos.push_back(static_cast<float>(std::cos(position * step)));
            sin.push_back(static_cast<float>(std::sin(position * step)));
            far_cos.push_back(static_cast<float>(std::cos(back * step)));
            far_sin.push_back(static_cast<float>(std::sin(back * step)));
        }
    }

    static void apply(const float *x, const std::vector<float> &cos, const std::vector<float> &sin, float *to) {
        const size_t n = cos.size();
        for (size_t i = 0; i < n; ++i) {
            to[i] = x[i] * cos[i] - x[i + n] * sin[i];
            to[i + n] = x[i + n] * cos[i] + x[i] * sin[i];
        }
    }
};

struct Tokens {  // of a call: each session's next ones
    int64_t batch, length;
    const int64_t *positions, *lengths;  // [B]: tokens before, and tokens that count

    int64_t rows() const { return batch * length; }
    int64_t position(int64_t row) const { return positions[row / length] + row % length; }
    bool counts(int64_t row) const { return row % length < lengths[row / length] && position(row) >= 0; }
};

struct Scratch {  // of a call
    std::vector<float> h, qkv, mixed, inner;  // [R, ...]
    std::vector<Turn> turns;                  // [R]
    Inputs inputs;
};

struct Own {  // of a thread in a call
    std::vector<float> scores;      // [H / G, W + P + 16]
    std::vector<uint16_t> rounded;  // [H / G, E]
    std::vector<float> turned;      // [E]
    std::vector<float> normed;      // [D]
};

__m512i alternating(int from) {  // eight of one vector and eight of another, by turns
    const __m512i order = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_add_epi32(order, _mm512_set1_epi32(from));
}

// The sums of 16 vectors, in order.
__m512 sums(const __m512 *x) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i, x += 4) {
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    const auto fold = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    return fold(fold(four[0], four[1]), fold(four[2], four[3]));
}

// e^(x - the largest), in place. Returns 1 / their sum.
float raise(float *x, int64_t count) {
    const auto within = [&](int64_t s) {
        return static_cast<__mmask16>(count - s >= 16 ? 0xFFFF : (1u << (count - s)) - 1);
    };
    __m512 most = _mm512_set1_ps(x[0]), total = _mm512_setzero_ps();
    for (int64_t s = 0; s < count; s += 16) most = _mm512_mask_max_ps(most, within(s), most, _mm512_loadu_ps(x + s));
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t s = 0; s < count; s += 16) {
        const __m512 raised = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(within(s), x + s), top));
        _mm512_mask_storeu_ps(x + s, within(s), raised);
        total = _mm512_add_ps(total, _mm512_maskz_mov_ps(within(s), raised));
    }
    return 1.0f / _mm512_reduce_add_ps(total);
}

// Q query heads' products with 16 keys of a ring.
template <int Q, int E>
void score(const uint16_t *keys, const Own &own, int64_t dim, float scale, float *const (&to)[Q]) {
    for (int q = 0; q < Q; ++q) {
        __m512 products[BLOCK];
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK; ++i) {
            products[i] = _mm512_setzero_ps();
            const int64_t end = E ? E : dim;
#pragma GCC unroll 4
            for (int64_t e = 0; e < end; e += 32)
                products[i] = _mm512_dpbf16_ps(products[i], pairs(_mm512_loadu_si512(keys + i * dim + e)),
                                               pairs(_mm512_loadu_si512(own.rounded.data() + q * dim + e)));
        }
        _mm512_storeu_ps(to[q], _mm512_mul_ps(sums(products), _mm512_set1_ps(scale)));
    }
}

// What Q query heads of one kv head, from `first` on, see in its ring. E: the size of a head, 0 for any.
template <int Q, int E>
void look(const Body &body, const Layer &layer, int64_t head, int64_t first, int64_t seen, const Turn &turn,
          const float *qkv, const uint16_t *keys, const uint16_t *values, float *mixed, Own &own) {
    constexpr int AT_ONCE = E ? E / 32 : 1;  // vectors of 32 values
    const int64_t dim = E ? E : body.head_dim, lasting = body.num_persistent, count = seen + lasting;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    float *scores[Q];
    for (int q = 0; q < Q; ++q) {
        scores[q] = own.scores.data() + q * (body.window + lasting + BLOCK);
        Turn::apply(qkv + (first + q) * dim, turn.cos, turn.sin, own.turned.data());
        for (int64_t e = 0; e < dim; e += 16)
            narrow(_mm512_loadu_ps(own.turned.data() + e), own.rounded.data() + q * dim + e);
    }
    for (int64_t s = 0; s < seen; s += BLOCK) {
        float *to[Q];
        for (int q = 0; q < Q; ++q) to[q] = scores[q] + s;
        score<Q, E>(keys + s * dim, own, dim, scale, to);
    }
    float whole[Q];
    for (int q = 0; q < Q; ++q) {
        Turn::apply(qkv + (first + q) * dim, turn.far_cos, turn.far_sin, own.turned.data());
        for (int64_t p = 0; p < lasting; ++p) {
            const uint16_t *key = layer.persistent_keys + (p * body.num_kv_heads + head) * dim;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t e = 0; e < dim; e += 16)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(own.turned.data() + e), widen(key + e), sum);
            scores[q][seen + p] = scale * _mm512_reduce_add_ps(sum);
        }
        whole[q] = raise(scores[q], count);
    }
    for (int64_t e = 0; e < dim; e += 32 * AT_ONCE) {
        __m512 even[Q][AT_ONCE], odd[Q][AT_ONCE];
        for (int q = 0; q < Q; ++q)
            for (int i = 0; i < AT_ONCE; ++i) even[q][i] = odd[q][i] = _mm512_setzero_ps();
        const auto add = [&](int64_t s, const uint16_t *value) {
            __m512 a[AT_ONCE], b[AT_ONCE];
            for (int i = 0; i < AT_ONCE; ++i) {
                const __m512i both = _mm512_loadu_si512(value + e + 32 * i);
                a[i] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                b[i] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xFFFF0000)));
            }
            for (int q = 0; q < Q; ++q) {
                const __m512 share = _mm512_set1_ps(scores[q][s]);
                for (int i = 0; i < AT_ONCE; ++i) {
                    even[q][i] = _mm512_fmadd_ps(share, a[i], even[q][i]);
                    odd[q][i] = _mm512_fmadd_ps(share, b[i], odd[q][i]);
                }
            }
        };
        for (int64_t s = 0; s < seen; ++s) add(s, values + s * dim);
        for (int64_t p = 0; p < lasting; ++p)
            add(seen + p, layer.persistent_values + (p * body.num_kv_heads + head) * dim);
        for (int q = 0; q < Q; ++q)
            for (int i = 0; i < AT_ONCE; ++i) {
                float *to = mixed + (first + q) * dim + e + 32 * i;
                const __m512 a = _mm512_mul_ps(even[q][i], _mm512_set1_ps(whole[q]));
                const __m512 b = _mm512_mul_ps(odd[q][i], _mm512_set1_ps(whole[q]));
                _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, alternating(0), b));
                _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(a, alternating(8), b));
            }
    }
}

// One token, one kv head: its key and value into the ring, and what its queries see there.
void attend(const Body &body, const Layer &layer, int64_t head, int64_t position, const Turn &turn, const float *qkv,
            uint16_t *keys, uint16_t *values, float *mixed, Own &own) {
    const int64_t dim = body.head_dim, slot = position % body.window, shared = body.num_heads / body.num_kv_heads;
    const int64_t seen = std::min(position + 1, body.window), end = (head + 1) * shared;
    const float *k = qkv + (body.num_heads + head) * dim, *v = k + body.num_kv_heads * dim;
    Turn::apply(k, turn.cos, turn.sin, own.turned.data());
    for (int64_t e = 0; e < dim; e += 16) {
        narrow(_mm512_loadu_ps(own.turned.data() + e), keys + slot * dim + e);
        narrow(_mm512_loadu_ps(v + e), values + slot * dim + e);
    }
    const auto look_at = [&]<int Q>(int64_t first) {
        if (dim == 64) look<Q, 64>(body, layer, head, first, seen, turn, qkv, keys, values, mixed, own);
        else look<Q, 0>(body, layer, head, first, seen, turn, qkv, keys, values, mixed, own);
    };
    int64_t i = head * shared;
    for (; i + 3 <= end; i += 3) look_at.template operator()<3>(i);
    for (; i < end; ++i) look_at.template operator()<1>(i);
}

// One layer, as one of a team's threads computes it.
void run_layer(const Body &body, const Layer &layer, const Tokens &tokens, uint16_t *keys, uint16_t *values,
               Scratch &all, Own &own, Team &team, int index) {
    const int64_t size = body.size, heads_size = body.num_heads * body.head_dim, inner = body.inner;
    const int64_t qkv_size = layer.qkv.num_outputs, ring = body.window * body.head_dim, rows = tokens.rows();
    const Share ours = team.share(rows, index);
    const auto normed = [&](const float *weight) {
        for (int64_t r = ours.begin; r < ours.end; ++r) {
            norm(all.h.data() + r * size, weight, body.eps, size, own.normed.data());
            all.inputs.take(r, own.normed.data(), size);
        }
        team.barrier.wait();
    };
    const auto whole = [&](const std::vector<float> &from, int64_t width) {
        for (int64_t r = ours.begin; r < ours.end; ++r) all.inputs.take(r, from.data() + r * width, width);
        team.barrier.wait();
    };
    const auto add = [&](int64_t row, int64_t n, __m512 x) {
        float *h = all.h.data() + row * size + n;
        _mm512_storeu_ps(h, _mm512_add_ps(_mm512_loadu_ps(h), x));
    };

    normed(layer.attention_norm);
    multiply(layer.qkv, team.share(qkv_size / BLOCK, index), all.inputs, rows,
             [&](int64_t r, int64_t n, __m512 x) { _mm512_storeu_ps(all.qkv.data() + r * qkv_size + n, x); });
    team.barrier.wait();

    const Share units = team.share(tokens.batch * body.num_kv_heads, index);
    for (int64_t unit = units.begin; unit < units.end; ++unit)  // a session's tokens one after the other: rings move on
        for (int64_t t = 0; t < tokens.length; ++t) {
            const int64_t r = unit / body.num_kv_heads * tokens.length + t, head = unit % body.num_kv_heads;
            if (!tokens.counts(r)) continue;
            attend(body, layer, head, tokens.position(r), all.turns[r], all.qkv.data() + r * qkv_size,
                   keys + unit * ring, values + unit * ring, all.mixed.data() + r * heads_size, own);
        }
    team.barrier.wait();

    whole(all.mixed, heads_size);
    multiply(layer.out, team.share(size / BLOCK, index), all.inputs, rows, add);
    team.barrier.wait();

    normed(layer.mlp_norm);
    const Share gates = team.share(inner / BLOCK, index), ups = {gates.begin + inner / BLOCK, gates.end + inner / BLOCK};
    multiply(layer.gate_up, gates, all.inputs, rows, [&](int64_t r, int64_t n, __m512 x) {
        _mm512_storeu_ps(all.inner.data() + r * inner + n, _mm512_mul_ps(x, sigmoid(x)));
    });
    multiply(layer.gate_up, ups, all.inputs, rows, [&](int64_t r, int64_t n, __m512 x) {
        float *to = all.inner.data() + r * inner + n - inner;
        _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), x));
    });
    team.barrier.wait();

    whole(all.inner, inner);
    multiply(layer.down, team.share(size / BLOCK, index), all.inputs, rows, add);
    team.barrier.wait();
}

// ---- memories

struct Heard {  // of a call: J = C + T tokens a session, those before and the new ones, normed and centred
    int64_t batch, length, reach, size;
    Inputs joined{.pairs = true}, fresh{.pairs = true};  // [B J, D] and, of the new ones alone, [B T, D]

    Heard(const Memory &m, int64_t batch, int64_t length, const uint16_t *recent)
        : batch(batch), length(length), reach(m.reach), size(m.size) {
        joined.resize(batch * (reach + length), size);
        fresh.resize(batch * length, size);
        for (int64_t b = 0; b < batch; ++b)
            std::copy_n(recent + b * reach * size, reach * size, joined.rounded.data() + b * (reach + length) * size);
    }

    void take(const Memory &m, int64_t r, const uint16_t *h, float *own) {
        for (int64_t i = 0; i < size; i += 16) _mm512_storeu_ps(own + i, widen(h + r * size + i));
        norm(own, m.norm, m.eps, size, own);
        for (int64_t i = 0; i < size; i += 16) {
            const __m512 x = rounded(_mm512_loadu_ps(own + i));
            _mm512_storeu_ps(own + i, _mm512_sub_ps(x, _mm512_loadu_ps(m.center + i)));
        }
        fresh.take(r, own, size);
        joined.take(r + (r / length + 1) * reach, own, size);
    }

    int64_t rows() const { return batch * (reach + length); }

    void move(const int64_t *lengths, uint16_t *to) const {  // the last C tokens of those that count
        for (int64_t b = 0; b < batch; ++b)
            std::copy_n(joined.rounded.data() + (b * (reach + length) + lengths[b]) * size, reach * size,
                        to + b * reach * size);
    }
};

// Sixteen floats of a causal convolution: x and taps [C + 1, width].
__m512 convolve(const float *x, const float *taps, int64_t reach, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i <= reach; ++i)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + i * width), _mm512_loadu_ps(taps + i * width), sum);
    return sum;
}

// A key or query as the memory sees it, of unit length: what its tokens project to [C + 1, H K], convolved, then products
// of neighbours, or SiLU. `own`: room for products + K floats.
void feature(const Memory &m, int64_t head, const float *projected, const float *taps, float *own, float *to) {
    const int64_t dim = m.key_dim, width = m.num_heads * dim, first = head * dim;
    float *key = own + m.products;
    for (int64_t k = 0; k < dim; k += 16) {
        const __m512 x = convolve(projected + first + k, taps + first + k, m.reach, width);
        _mm512_storeu_ps(key + k, m.products ? x : _mm512_mul_ps(x, sigmoid(x)));
    }
    std::copy(key + dim - m.products, key + dim, own);  // the first floats' neighbours are the last
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = m.products ? 1 : 0; i <= m.products; ++i)
        for (int64_t k = 0; k < dim; k += 16) {
            __m512 x = _mm512_loadu_ps(key + k);
            if (i) x = _mm512_mul_ps(x, _mm512_loadu_ps(key + k - i));
            _mm512_storeu_ps(to + (i ? i - 1 : 0) * dim + k, x);
            squares = _mm512_fmadd_ps(x, x, squares);
        }
    const __m512 by = _mm512_set1_ps(1.0f / std::max(std::sqrt(_mm512_reduce_add_ps(squares)), 1e-12f));
    for (int64_t f = 0; f < m.features(); f += 16) _mm512_storeu_ps(to + f, _mm512_mul_ps(_mm512_loadu_ps(to + f), by));
}

// Calls f with <N> and the first column for all columns of a matrix, 16 N at a time.
template <class F> void in_columns(int64_t columns, F &&f) {
    int64_t v = 0;
    for (; v + 112 <= columns; v += 112) f.template operator()<7>(v);  // a head of 112 in one go
    const int64_t left = (columns - v) / 16;
    if (left & 4) f.template operator()<4>(v), v += 64;
    if (left & 2) f.template operator()<2>(v), v += 32;
    if (left & 1) f.template operator()<1>(v);
}

// to [T, 16 N] += x [T, F] y [F, 16 N], `count` of the F. Strides are between rows.
template <int T, int N>
void add_product(const float *x, int64_t x_stride, const float *y, int64_t stride, int64_t count, float *to,
                 int64_t to_stride) {
    __m512 total[T][N];
    for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) total[t][n] = _mm512_loadu_ps(to + t * to_stride + 16 * n);
    for (int64_t f = 0; f < count; ++f) {
        __m512 row[N];
        for (int n = 0; n < N; ++n) row[n] = _mm512_loadu_ps(y + f * stride + 16 * n);
        for (int t = 0; t < T; ++t) {
            const __m512 one = _mm512_set1_ps(x[t * x_stride + f]);
            for (int n = 0; n < N; ++n) total[t][n] = _mm512_fmadd_ps(one, row[n], total[t][n]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(to + t * to_stride + 16 * n, total[t][n]);
}

// What keys or queries [T, F] find in weights [F, V], to [T, V].
void look_up(const float *keys, int64_t length, const float *weights, int64_t features, int64_t values, float *to,
             int64_t to_stride) {
    constexpr int64_t AT_ONCE = 32;  // features, whose weights stay in the nearest cache for all tokens
    for (int64_t t = 0; t < length; ++t) std::fill_n(to + t * to_stride, values, 0.0f);
    for (int64_t f = 0; f < features; f += AT_ONCE) {
        const int64_t count = std::min(AT_ONCE, features - f);
        in_columns(values, [&]<int N>(int64_t v) {
            const float *y = weights + f * values + v;
            int64_t t = 0;
            for (; t + 4 <= length; t += 4)
                add_product<4, N>(keys + t * features + f, features, y, values, count, to + t * to_stride + v, to_stride);
            for (; t < length; ++t)
                add_product<1, N>(keys + t * features + f, features, y, values, count, to + t * to_stride + v, to_stride);
        });
    }
}

// ---- what is written: `titans.memory.linear`, a chunk at a time, one head of one session

struct Gates {  // of one token and head
    float theta;        // the step, as taken
    double keep, eta;   // 1 - alpha, and momentum
};

Gates gates_of(const Memory &m, int64_t head, const float *x) {  // x [D]: what the gates are made of
    const auto gate = [&](int64_t kind) {
        const float *weights = m.gates + (kind * m.num_heads + head) * m.size;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < m.size; i += 16)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(weights + i), _mm512_loadu_ps(x + i), sum);
        return static_cast<double>(_mm512_reduce_add_ps(sum)) + m.gates_bias[kind * m.num_heads + head];
    };
    const double eta = m.has_momentum ? m.most_momentum / (1 + std::exp(-gate(1 + m.forgets))) : 0.0;
    const double keep = m.forgets ? 1 / (1 + std::exp(gate(1))) : 1.0;
    return {static_cast<float>((1 - eta) / (1 + std::exp(-gate(0)))), keep, eta};
}

struct Chunk {  // room for one
    std::vector<float> keys;                       // [S, F]
    std::vector<float> similar;                    // [S, S]: keys with those before
    std::vector<float> errors, expected, carried;  // [S, V]: what tokens miss; what memory and momentum had for them
    std::vector<float> left;                       // [S, V]
    std::vector<float> weight, share;              // [S]: how tokens weigh in the memory and in the momentum by now
    std::vector<float> some;                       // [S, 16]
    std::vector<Gates> gates;                      // [S]

    Chunk(const Memory &m)
        : keys(m.chunk * m.features()), similar(m.chunk * m.chunk), errors(m.chunk * m.value_dim),
          expected(errors), carried(errors), left(errors), weight(m.chunk), share(m.chunk), some(m.chunk * 16),
          gates(m.chunk) {}
};

// Products of each key with those before it, four by four.
void compare(const float *keys, int64_t length, int64_t features, int64_t stride, float *to) {
    for (int64_t t = 0; t < length; t += 4)
        for (int64_t j = 0; j <= t; j += 4) {
            __m512 total[16];
            for (auto &x : total) x = _mm512_setzero_ps();
            const float *a[4], *b[4];
            for (int i = 0; i < 4; ++i) {
                a[i] = keys + std::min(t + i, length - 1) * features;
                b[i] = keys + std::min(j + i, length - 1) * features;
            }
            for (int64_t f = 0; f < features; f += 16) {
                __m512 x[4];
                for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_ps(b[i] + f);
                for (int i = 0; i < 4; ++i) {
                    const __m512 y = _mm512_loadu_ps(a[i] + f);
                    for (int k = 0; k < 4; ++k) total[4 * i + k] = _mm512_fmadd_ps(y, x[k], total[4 * i + k]);
                }
            }
            alignas(64) float found[16];
            _mm512_store_ps(found, sums(total));
            for (int64_t i = 0; i < std::min<int64_t>(4, length - t); ++i)
                for (int64_t k = 0; k < 4 && j + k < t + i; ++k) to[(t + i) * stride + j + k] = found[4 * i + k];
        }
}

// What a chunk of `length` tokens, whose keys, gates and values (in `errors`, negated) are there, makes of a head's
// weights and momentum [F, V]; the new ones may stand where the old ones do. momentum is null where there is none.
void learn_chunk(const Memory &m, Chunk &own, int64_t length, const float *weights, const float *momentum,
                 float *new_weights, float *new_momentum) {
    const int64_t features = m.features(), values = m.value_dim;
    compare(own.keys.data(), length, features, m.chunk, own.similar.data());
    look_up(own.keys.data(), length, weights, features, values, own.expected.data(), values);
    if (momentum) look_up(own.keys.data(), length, momentum, features, values, own.carried.data(), values);
    double keep = 1, carry = 0, decay = 1;
    for (int64_t t = 0; t < length; ++t) {  // each token's error, from the memory as of the token before
        float *error = own.errors.data() + t * values;
        const float *found = own.expected.data() + t * values, *moving = own.carried.data() + t * values;
        for (int64_t v = 0; v < values; v += 16) {
            __m512 x = _mm512_fmadd_ps(_mm512_set1_ps(keep), _mm512_loadu_ps(found + v), _mm512_loadu_ps(error + v));
            if (momentum) x = _mm512_fmadd_ps(_mm512_set1_ps(carry), _mm512_loadu_ps(moving + v), x);
            _mm512_storeu_ps(error + v, x);
        }
        for (int64_t j = 0; j < t; ++j)
            own.some[j] = -own.weight[j] * own.gates[j].theta * own.similar[t * m.chunk + j];
        in_columns(values, [&]<int N>(int64_t v) {
            add_product<1, N>(own.some.data(), 0, own.errors.data() + v, values, t, error + v, values);
        });
        const auto [theta, kept, eta] = own.gates[t];
        for (int64_t j = 0; j < t; ++j) {
            own.share[j] *= static_cast<float>(eta);
            own.weight[j] = static_cast<float>(kept) * own.weight[j] + own.share[j];
        }
        own.share[t] = own.weight[t] = 1;
        decay *= eta;
        keep *= kept;
        carry = kept * carry + decay;
    }
    for (int64_t t = 0; t < length; ++t)
        for (int64_t v = 0; v < values; v += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(own.errors.data() + t * values + v),
                                           _mm512_set1_ps(-own.gates[t].theta));
            _mm512_storeu_ps(own.left.data() + t * values + v, _mm512_mul_ps(x, _mm512_set1_ps(own.share[t])));
            _mm512_storeu_ps(own.errors.data() + t * values + v, _mm512_mul_ps(x, _mm512_set1_ps(own.weight[t])));
        }
    const __m512 keeps = _mm512_set1_ps(keep), carries = _mm512_set1_ps(carry), decays = _mm512_set1_ps(decay);
    for (int64_t f = 0; f < features; f += 16) {
        for (int64_t t = 0; t < length; ++t)  // as columns, which would else fall on one line of the cache
            for (int i = 0; i < 16; ++i) own.some[i * length + t] = own.keys[t * features + f + i];
        for (int64_t at = f * values; at < (f + 16) * values; at += 16) {
            __m512 x = _mm512_mul_ps(keeps, _mm512_loadu_ps(weights + at));
            if (momentum) {
                const __m512 y = _mm512_loadu_ps(momentum + at);
                x = _mm512_fmadd_ps(carries, y, x);
                _mm512_storeu_ps(new_momentum + at, _mm512_mul_ps(decays, y));
            }
            _mm512_storeu_ps(new_weights + at, x);
        }
        const auto add = [&](const float *errors, float *to) {
            in_columns(values, [&]<int N>(int64_t v) {
                for (int i = 0; i < 16; i += 4)
                    add_product<4, N>(own.some.data() + i * length, length, errors + v, values, length,
                                      to + (f + i) * values + v, values);
            });
        };
        add(own.errors.data(), new_weights);
        if (momentum) add(own.left.data(), new_momentum);
    }
}

}  // namespace

extern "C" {

Team *titans_team(int size) { return new Team(size); }

void titans_end(Team *team) { delete team; }

// x [R, K] bfloat16 to y [R, N] bfloat16.
void titans_multiply(Team *team, const Matrix *matrix, int64_t rows, const uint16_t *x, uint16_t *y) {
    const bool codes = matrix->kind != SIXTEEN;
    Inputs inputs{.codes = codes, .pairs = !codes};
    inputs.resize(rows, matrix->num_inputs);
    team->run([&](int index) {
        const Share ours = team->share(rows, index);
        std::vector<float> row(matrix->num_inputs);
        for (int64_t r = ours.begin; r < ours.end; ++r) {
            for (int64_t k = 0; k < matrix->num_inputs; k += 16)
                _mm512_storeu_ps(row.data() + k, widen(x + r * matrix->num_inputs + k));
            inputs.take(r, row.data(), matrix->num_inputs);
        }
        team->barrier.wait();
        multiply(*matrix, team->share(matrix->num_outputs / BLOCK, index), inputs, rows,
                 [&](int64_t r, int64_t n, __m512 total) { narrow(total, y + r * matrix->num_outputs + n); });
    });
}

// h [B, T, D] bfloat16 through layers that follow one another, in place. Session b has positions[b] tokens before, and
// of its T the first lengths[b] count, but for those whose position is below 0; what the others become means nothing.
// keys and values: of each layer, its rings [B, G, W, E] bfloat16, which move on.
void titans_layers(Team *team, const Body *body, const Layer *layers, int64_t num_layers, int64_t batch, int64_t length,
                   const int64_t *positions, const int64_t *lengths, uint16_t *h, uint16_t *const *keys,
                   uint16_t *const *values) {
    const Tokens tokens{batch, length, positions, lengths};
    const int64_t size = body->size, heads_size = body->num_heads * body->head_dim, rows = tokens.rows();
    Scratch all;
    all.h.resize(rows * size);
    all.qkv.resize(rows * layers[0].qkv.num_outputs);
    all.mixed.resize(rows * heads_size);
    all.inner.resize(rows * body->inner);
    for (int64_t i = 0; i < num_layers; ++i)
        for (const Matrix *matrix : {&layers[i].qkv, &layers[i].out, &layers[i].gate_up, &layers[i].down})
            (matrix->kind == SIXTEEN ? all.inputs.pairs : all.inputs.codes) = true;
    all.inputs.resize(rows, std::max({size, heads_size, body->inner}));
    for (int64_t r = 0; r < rows; ++r) all.turns.emplace_back(tokens.position(r), *body);
    for (int64_t i = 0; i < rows * size; i += 16) _mm512_storeu_ps(all.h.data() + i, widen(h + i));
    team->run([&](int index) {
        Own own;
        const int64_t shared = body->num_heads / body->num_kv_heads;
        own.scores.resize(shared * (body->window + body->num_persistent + BLOCK));
        own.rounded.resize(shared * body->head_dim);
        own.turned.resize(body->head_dim);
        own.normed.resize(size);
        for (int64_t i = 0; i < num_layers; ++i)
            run_layer(*body, layers[i], tokens, keys[i], values[i], all, own, *team, index);
    });
    for (int64_t i = 0; i < rows * size; i += 16) narrow(_mm512_loadu_ps(all.h.data() + i), h + i);
}

// What a memory answers to h [B, T, D] bfloat16, writing nothing: y [B, T, D] bfloat16. Session b's weights, [H, F, V]
// float32, are at weights + b * stride. recent [B, C, D] bfloat16: its last inputs; moved: those after its first
// lengths[b] tokens.
void titans_read(Team *team, const Memory *memory, int64_t batch, int64_t length, const int64_t *lengths,
                 const uint16_t *h, const float *weights, int64_t stride, const uint16_t *recent, uint16_t *y,
                 uint16_t *moved) {
    const Memory &m = *memory;
    const int64_t size = m.size, rows = batch * length, features = m.features();
    const int64_t width = m.num_heads * m.key_dim, values = m.num_heads * m.value_dim;
    Heard heard(m, batch, length, recent);
    Inputs answers{.pairs = true};
    answers.resize(rows, values);
    std::vector<float> projected(heard.rows() * width), gates(rows * values), reads(rows * values);
    team->run([&](int index) {
        std::vector<float> row(std::max(size, values)), queries(4 * features), own(m.products + m.key_dim);
        const Share ours = team->share(rows, index);
        for (int64_t r = ours.begin; r < ours.end; ++r) heard.take(m, r, h, row.data());
        team->barrier.wait();
        multiply(m.query, team->share(width / BLOCK, index), heard.joined, heard.rows(),
                 [&](int64_t r, int64_t n, __m512 x) { _mm512_storeu_ps(projected.data() + r * width + n, x); });
        multiply(m.out_gate, team->share(values / BLOCK, index), heard.fresh, rows, [&](int64_t r, int64_t n, __m512 x) {
            const __m512 gate = sigmoid(_mm512_add_ps(x, _mm512_loadu_ps(m.out_gate_bias + n)));
            _mm512_storeu_ps(gates.data() + r * values + n, gate);
        });
        team->barrier.wait();
        const Share units = team->share(batch * m.num_heads, index);
        for (int64_t unit = units.begin; unit < units.end; ++unit) {
            const int64_t b = unit / m.num_heads, head = unit % m.num_heads;
            const float *asked = weights + b * stride + head * features * m.value_dim;
            for (int64_t t = 0; t < length; t += 4) {
                const int64_t some = std::min<int64_t>(4, length - t);
                for (int64_t i = 0; i < some; ++i)
                    feature(m, head, projected.data() + (b * (m.reach + length) + t + i) * width, m.query_taps,
                            own.data(), queries.data() + i * features);
                look_up(queries.data(), some, asked, features, m.value_dim,
                        reads.data() + (b * length + t) * values + head * m.value_dim, values);
            }
        }
        team->barrier.wait();
        for (int64_t r = ours.begin; r < ours.end; ++r) {
            for (int64_t v = 0; v < values; v += 16) {
                const __m512 x = _mm512_loadu_ps(reads.data() + r * values + v);
                _mm512_storeu_ps(row.data() + v, _mm512_mul_ps(x, _mm512_loadu_ps(gates.data() + r * values + v)));
            }
            answers.take(r, row.data(), values);
        }
        team->barrier.wait();
        multiply(m.out, team->share(size / BLOCK, index), answers, rows,
                 [&](int64_t r, int64_t n, __m512 x) { narrow(x, y + r * size + n); });
    });
    heard.move(lengths, moved);
}

// A memory after the first lengths[b] tokens of h [B, T, D] bfloat16, answering none. Session b's weights and momentum,
// [H, F, V] float32, are at weights + b * stride and momentum + b * momentum_stride (null: it has none); they are not
// changed. new_weights, new_momentum: the same after, [B, H, F, V]. recent and moved as in titans_read.
void titans_write(Team *team, const Memory *memory, int64_t batch, int64_t length, const int64_t *lengths,
                  const uint16_t *h, const float *weights, int64_t stride, const float *momentum,
                  int64_t momentum_stride, const uint16_t *recent, float *new_weights, float *new_momentum,
                  uint16_t *moved) {
    const Memory &m = *memory;
    const int64_t size = m.size, rows = batch * length, joined = m.reach + length, head_size = m.features() * m.value_dim;
    const int64_t width = m.num_heads * m.key_dim, values = m.num_heads * m.value_dim;
    Heard heard(m, batch, length, recent);
    std::vector<float> projected(heard.rows() * width), offered(heard.rows() * values);
    std::vector<Gates> gates(rows * m.num_heads);
    team->run([&](int index) {
        std::vector<float> row(size), input(size * (m.gate_reach + 1)), own(m.products + m.key_dim);
        const Share ours = team->share(rows, index);
        for (int64_t r = ours.begin; r < ours.end; ++r) heard.take(m, r, h, row.data());
        team->barrier.wait();
        const auto keep = [](std::vector<float> &to, int64_t columns) {
            return [&to, columns](int64_t r, int64_t n, __m512 x) { _mm512_storeu_ps(to.data() + r * columns + n, x); };
        };
        multiply(m.key, team->share(width / BLOCK, index), heard.joined, heard.rows(), keep(projected, width));
        multiply(m.value, team->share(values / BLOCK, index), heard.joined, heard.rows(), keep(offered, values));
        for (int64_t r = ours.begin; r < ours.end; ++r) {
            const int64_t first = r + (r / length + 1) * m.reach - m.gate_reach;
            for (int64_t i = 0; i < size * (m.gate_reach + 1); i += 16)
                _mm512_storeu_ps(input.data() + i, widen(heard.joined.rounded.data() + first * size + i));
            for (int64_t i = 0; i < size; i += 16)
                _mm512_storeu_ps(row.data() + i, convolve(input.data() + i, m.gate_taps + i, m.gate_reach, size));
            for (int64_t head = 0; head < m.num_heads; ++head)
                gates[r * m.num_heads + head] = gates_of(m, head, row.data());
        }
        team->barrier.wait();
        Chunk chunk(m);
        const Share units = team->share(batch * m.num_heads, index);
        for (int64_t unit = units.begin; unit < units.end; ++unit) {
            const int64_t b = unit / m.num_heads, head = unit % m.num_heads;
            const float *from = weights + b * stride + head * head_size;
            const float *moving = momentum ? momentum + b * momentum_stride + head * head_size : nullptr;
            float *to = new_weights + unit * head_size, *left = momentum ? new_momentum + unit * head_size : nullptr;
            if (!lengths[b]) {
                std::copy_n(from, head_size, to);
                if (momentum) std::copy_n(moving, head_size, left);
            }
            for (int64_t start = 0; start < lengths[b]; start += m.chunk) {
                const int64_t count = std::min(m.chunk, lengths[b] - start);
                for (int64_t t = 0; t < count; ++t) {
                    const int64_t r = b * joined + start + t;
                    feature(m, head, projected.data() + r * width, m.key_taps, own.data(),
                            chunk.keys.data() + t * m.features());
                    const int64_t v = head * m.value_dim;
                    for (int64_t i = 0; i < m.value_dim; i += 16) {
                        const __m512 x = convolve(offered.data() + r * values + v + i, m.value_taps + v + i, m.reach, values);
                        _mm512_storeu_ps(chunk.errors.data() + t * m.value_dim + i, _mm512_sub_ps(_mm512_setzero_ps(), x));
                    }
                    chunk.gates[t] = gates[(b * length + start + t) * m.num_heads + head];
                }
                learn_chunk(m, chunk, count, from, moving, to, left);
                from = to;
                moving = left;
            }
        }
    });
    heard.move(lengths, moved);
}
}
