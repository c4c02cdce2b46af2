// What a linear memory is asked: tokens' inputs, keys and queries, and what these find in its weights.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.h"
#include "products.h"

namespace {

constexpr int TOGETHER = 4;  // queries of a head: what they are looked up in is read once for them

struct Memory {  // a linear memory, and what tokens ask and write it through
    int64_t size, num_heads, key_dim, value_dim, reach, gate_reach, products, chunk, forgets, momentum_reach, protected_keys;
    double eps, most_momentum, write_threshold, read_threshold, margin_threshold, whole_margin;
    double firmness, another, same, slack, most_weight, least_step;  // see protection.h
    const float *norm, *center;                       // [D]
    const float *query_taps, *key_taps, *value_taps;  // [C + 1, H, K] and, of values, [C + 1, H, V]; the last: its own
    const float *gate_taps;                           // [gate_reach + 1, D]
    const float *gates, *gates_bias;                  // [gates, H, D] and [gates, H]: theta, alpha, eta
    const float *out_gate_bias;                       // [H, V]
    Matrix query, key, value, out_gate, out;          // of kind SIXTEEN

    int64_t features() const { return key_dim * std::max<int64_t>(1, products); }
};

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

// What a key or query is made of, K floats: what its tokens project to [C + 1, H K], convolved and, where there are no
// products, through SiLU. `to` has room for as many floats as there are products before it.
void factors(const Memory &m, int64_t head, const float *projected, const float *taps, float *to) {
    const int64_t dim = m.key_dim, width = m.num_heads * dim, first = head * dim;
    for (int64_t k = 0; k < dim; k += 16) {
        const __m512 x = convolve(projected + first + k, taps + first + k, m.reach, width);
        _mm512_storeu_ps(to + k, m.products ? x : _mm512_mul_ps(x, sigmoid(x)));
    }
}

// A key or query as the memory sees it, but for its length, which is returned: products of neighbours, if it has any.
float expand(const Memory &m, float *made_of, float *to) {
    const int64_t dim = m.key_dim;
    std::copy_n(made_of + dim - m.products, m.products, made_of - m.products);  // the first floats' neighbours are the last
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = m.products ? 1 : 0; i <= m.products; ++i)
        for (int64_t k = 0; k < dim; k += 16) {
            __m512 x = _mm512_loadu_ps(made_of + k);
            if (i) x = _mm512_mul_ps(x, _mm512_loadu_ps(made_of + k - i));
            _mm512_storeu_ps(to + (i ? i - 1 : 0) * dim + k, x);
            squares = _mm512_fmadd_ps(x, x, squares);
        }
    return std::sqrt(_mm512_reduce_add_ps(squares));
}

// The same, of unit length; returns what its length was.
float feature(const Memory &m, float *made_of, float *to) {
    const float length = std::max(expand(m, made_of, to), 1e-12f);
    const __m512 by = _mm512_set1_ps(1.0f / length);
    for (int64_t f = 0; f < m.features(); f += 16) _mm512_storeu_ps(to + f, _mm512_mul_ps(_mm512_loadu_ps(to + f), by));
    return length;
}

// The share of x that counts: none below the threshold, and from twice that on all.
double passed(double threshold, double x) { return std::clamp(x / threshold - 1, 0.0, 1.0); }

struct Answer {  // of one token: [D], and its root mean square
    int64_t size;
    uint16_t *y;
    double rms;

    Answer(int64_t size, uint16_t *y) : size(size), y(y) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += 16) {
            const __m512 x = widen(y + i);
            squares = _mm512_fmadd_ps(x, x, squares);
        }
        rms = std::sqrt(_mm512_reduce_add_ps(squares) / size);
    }

    void scale(double by) {
        const __m512 factor = _mm512_set1_ps(by);
        for (int64_t i = 0; i < size; i += 16) narrow(_mm512_mul_ps(widen(y + i), factor), y + i);
    }
};

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

// Products of `count` rows [N, F] with x [F].
void with_each(const float *rows, int64_t count, int64_t features, const float *x, float *to) {
    for (int64_t i = 0; i < count; ++i) {
        __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t f = 0; f < features; f += 16) {
            __m512 &sum = total[f / 16 % 2];
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(rows + i * features + f), _mm512_loadu_ps(x + f), sum);
        }
        to[i] = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
    }
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

}  // namespace
