// What is written: `titans.memory.linear`, a chunk at a time, one head of one session.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace {

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
    double theta = 1 / (1 + std::exp(-gate(0)));
    if (m.write_threshold > 0) theta *= std::clamp(theta / m.write_threshold - 1, 0.0, 1.0);
    return {static_cast<float>((1 - eta) * theta), keep, eta};
}

// Whether one of `length` gates, which stand `stride` apart, lets anything be written.
bool writes(const Gates *gates, int64_t length, int64_t stride) {
    for (int64_t t = 0; t < length; ++t)
        if (gates[t * stride].theta != 0) return true;
    return false;
}

struct Fading {  // of memory and momentum over some tokens, whatever these write
    double keep = 1, carry = 0, decay = 1;

    void pass(const Gates &token) {
        decay *= token.eta;
        keep *= token.keep;
        carry = token.keep * carry + decay;
    }

    // `count` floats. momentum is null where there is none; the new ones may stand where the old ones do.
    void apply(int64_t count, const float *weights, const float *momentum, float *to, float *left) const {
        const __m512 keeps = _mm512_set1_ps(keep), carries = _mm512_set1_ps(carry), decays = _mm512_set1_ps(decay);
        for (int64_t i = 0; i < count; i += 16) {
            __m512 x = _mm512_mul_ps(keeps, _mm512_loadu_ps(weights + i));
            if (momentum) {
                const __m512 y = _mm512_loadu_ps(momentum + i);
                x = _mm512_fmadd_ps(carries, y, x);
                _mm512_storeu_ps(left + i, _mm512_mul_ps(decays, y));
            }
            _mm512_storeu_ps(to + i, x);
        }
    }
};

struct Chunk {  // room for one
    int64_t features;
    std::vector<float> keys, directions;           // [S, F]; directions are the keys, where none is protected
    std::vector<float> similar;                    // [S, S]: keys with the directions of those before
    std::vector<float> errors, expected, carried;  // [S, V]: what tokens miss; what memory and momentum had for them
    std::vector<float> left;                       // [S, V]
    std::vector<float> weight, share;              // [S]: how tokens weigh in the memory and in the momentum by now
    std::vector<float> some;                       // [S, 16]
    std::vector<Gates> gates;                      // [S]

    Chunk(const Memory &m)
        : features(m.features()), keys(m.chunk * features), directions(m.protected_keys ? keys.size() : 0),
          similar(m.chunk * m.chunk), errors(m.chunk * m.value_dim), expected(errors), carried(errors), left(errors),
          weight(m.chunk), share(m.chunk), some(m.chunk * 16), gates(m.chunk) {}

    float *along(int64_t t) { return (directions.empty() ? keys : directions).data() + t * features; }
};

// Products of each key with the directions of those before it, four by four.
void compare(const float *keys, const float *directions, int64_t length, int64_t features, int64_t stride, float *to) {
    for (int64_t t = 0; t < length; t += 4)
        for (int64_t j = 0; j <= t; j += 4) {
            __m512 total[16];
            for (auto &x : total) x = _mm512_setzero_ps();
            const float *a[4], *b[4];
            for (int i = 0; i < 4; ++i) {
                a[i] = keys + std::min(t + i, length - 1) * features;
                b[i] = directions + std::min(j + i, length - 1) * features;
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
    compare(own.keys.data(), own.along(0), length, features, m.chunk, own.similar.data());
    look_up(own.keys.data(), length, weights, features, values, own.expected.data(), values);
    if (momentum) look_up(own.keys.data(), length, momentum, features, values, own.carried.data(), values);
    Fading fading;
    for (int64_t t = 0; t < length; ++t) {  // each token's error, from the memory as of the token before
        float *error = own.errors.data() + t * values;
        const float *found = own.expected.data() + t * values, *moving = own.carried.data() + t * values;
        for (int64_t v = 0; v < values; v += 16) {
            __m512 x = _mm512_fmadd_ps(_mm512_set1_ps(fading.keep), _mm512_loadu_ps(found + v), _mm512_loadu_ps(error + v));
            if (momentum) x = _mm512_fmadd_ps(_mm512_set1_ps(fading.carry), _mm512_loadu_ps(moving + v), x);
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
        fading.pass(own.gates[t]);
    }
    for (int64_t t = 0; t < length; ++t)
        for (int64_t v = 0; v < values; v += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(own.errors.data() + t * values + v),
                                           _mm512_set1_ps(-own.gates[t].theta));
            _mm512_storeu_ps(own.left.data() + t * values + v, _mm512_mul_ps(x, _mm512_set1_ps(own.share[t])));
            _mm512_storeu_ps(own.errors.data() + t * values + v, _mm512_mul_ps(x, _mm512_set1_ps(own.weight[t])));
        }
    for (int64_t f = 0; f < features; f += 16) {
        for (int64_t t = 0; t < length; ++t)  // as columns, which would else fall on one line of the cache
            for (int i = 0; i < 16; ++i) own.some[i * length + t] = own.along(t)[f + i];
        const int64_t at = f * values;
        fading.apply(16 * values, weights + at, momentum ? momentum + at : nullptr, new_weights + at,
                     momentum ? new_momentum + at : nullptr);
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
