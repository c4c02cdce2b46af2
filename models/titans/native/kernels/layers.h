// A body's layers: norms, rotation, attention over the ring, SwiGLU.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace {

struct Layer {
    const float *attention_norm, *mlp_norm;         // [D]
    Matrix qkv, out, gate_up, down;
    const uint16_t *persistent_keys, *persistent_values;  // [P, G, E] bfloat16
};

struct Body {
    int64_t size, num_heads, num_kv_heads, head_dim, inner, window, num_persistent;
    double theta, eps;
};

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

}  // namespace
