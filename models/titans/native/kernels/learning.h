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
    const double eta = m.momentum_reach ? m.most_momentum / (1 + std::exp(-gate(1 + m.forgets))) : 0.0;
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
};

struct Chunk {  // room for one, and for the steps before it that momentum carries on
    int64_t features, values, before, first = 0;  // of the R steps before, those from `first` on are not nothing
    std::vector<float> keys;                       // [S, F]
    std::vector<float> directions, steps, moved;   // [R + S, F] and [R + S, V] twice: of the steps before and its own, what
                                                   // is left of them as momentum, and what they add to the weights
    std::vector<float> similar;                    // [S, S]: keys with the directions of those before
    std::vector<float> errors, expected, carried;  // [S, V]: what tokens miss; what memory and momentum had for them
    std::vector<float> weight, share;              // [S]: how tokens weigh in the memory and in the momentum by now
    std::vector<float> some;                       // [R + S, 16]
    std::vector<Gates> gates;                      // [S]

    Chunk(const Memory &m)
        : features(m.features()), values(m.value_dim), before(m.momentum_reach), keys(m.chunk * features),
          directions((before + m.chunk) * features), steps((before + m.chunk) * values), moved(steps),
          similar(m.chunk * m.chunk), errors(m.chunk * values), expected(errors), carried(errors), weight(m.chunk),
          share(m.chunk), some((before + m.chunk) * 16), gates(m.chunk) {}

    float *along(int64_t t) { return directions.data() + (before + t) * features; }

    void take_steps(const float *momentum) {  // [R, F] and [R, V], the last one at the end
        std::copy_n(momentum, before * features, directions.data());
        std::copy_n(momentum + before * features, before * values, steps.data());
        find_first();
    }

    void give_steps(float *momentum) const {
        std::copy_n(steps.data(), before * values, std::copy_n(directions.data(), before * features, momentum));
    }

    void pass(int64_t length) {  // the steps before the next token: the last ones of those before, and of its own
        const auto rows = [&](std::vector<float> &x, int64_t size) {
            std::copy_n(x.begin() + length * size, before * size, x.begin());
        };
        rows(directions, features);
        rows(steps, values);
        find_first();
    }

  private:
    void find_first() {
        const auto end = steps.begin() + before * values;
        first = (std::find_if(steps.begin(), end, [](float x) { return x != 0; }) - steps.begin()) / values;
    }
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

// Weights [F, V] that keep so much of themselves, and are moved by `count` steps from the first that is not nothing on;
// the new ones may stand where the old ones do.
void move(Chunk &own, int64_t count, float keep, const float *weights, float *to) {
    const int64_t features = own.features, values = own.values;
    const float *directions = own.directions.data() + own.first * features, *moved = own.moved.data() + own.first * values;
    for (int64_t f = 0; f < features; f += 16) {
        for (int64_t r = 0; r < count; ++r)  // as columns, which would else fall on one line of the cache
            for (int i = 0; i < 16; ++i) own.some[i * count + r] = directions[r * features + f + i];
        for (int64_t i = f * values; i < (f + 16) * values; i += 16)
            _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_set1_ps(keep), _mm512_loadu_ps(weights + i)));
        in_columns(values, [&]<int N>(int64_t v) {
            for (int i = 0; count && i < 16; i += 4)
                add_product<4, N>(own.some.data() + i * count, count, moved + v, values, count, to + (f + i) * values + v,
                                  values);
        });
    }
}

// The steps before a chunk as they move the weights until it has passed, and what is left of them then.
void carry_on(Chunk &own, const Fading &fading) {
    for (int64_t i = own.first * own.values; i < own.before * own.values; ++i) {
        own.moved[i] = static_cast<float>(fading.carry) * own.steps[i];
        own.steps[i] *= static_cast<float>(fading.decay);
    }
}

// What a chunk of `length` tokens that write nothing makes of a head's weights [F, V] and of the steps before it; the
// new weights may stand where the old ones do.
void fade(Chunk &own, const Fading &fading, int64_t length, const float *weights, float *to) {
    carry_on(own, fading);
    move(own, own.before - own.first, static_cast<float>(fading.keep), weights, to);
    if (own.first == own.before) return;  // nothing was left, and nothing has come
    const int64_t own_steps = std::min(length, own.before);
    std::fill_n(own.along(length - own_steps), own_steps * own.features, 0.0f);
    std::fill_n(own.steps.begin() + (own.before + length - own_steps) * own.values, own_steps * own.values, 0.0f);
    own.pass(length);
}

// The same of one whose tokens' keys, directions, gates and values (in `errors`, negated) are there.
void learn_chunk(const Memory &m, Chunk &own, int64_t length, const float *weights, float *to) {
    const int64_t features = own.features, values = own.values, before = own.before - own.first;
    compare(own.keys.data(), own.along(0), length, features, m.chunk, own.similar.data());
    look_up(own.keys.data(), length, weights, features, values, own.expected.data(), values);
    Fading fading;
    for (int64_t t = 0; t < length; ++t) {  // each token's error, from the memory as of the token before
        float *error = own.errors.data() + t * values, *moving = own.carried.data() + t * values;
        const float *found = own.expected.data() + t * values;
        if (before) {
            const float *directions = own.directions.data() + own.first * features;
            with_each(directions, before, features, own.keys.data() + t * features, own.some.data());
            std::fill_n(moving, values, 0.0f);
            in_columns(values, [&]<int N>(int64_t v) {
                const float *steps = own.steps.data() + own.first * values + v;
                add_product<1, N>(own.some.data(), 0, steps, values, before, moving + v, values);
            });
        }
        for (int64_t v = 0; v < values; v += 16) {
            __m512 x = _mm512_fmadd_ps(_mm512_set1_ps(fading.keep), _mm512_loadu_ps(found + v), _mm512_loadu_ps(error + v));
            if (before) x = _mm512_fmadd_ps(_mm512_set1_ps(fading.carry), _mm512_loadu_ps(moving + v), x);
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
    carry_on(own, fading);
    for (int64_t t = 0; t < length; ++t) {
        const int64_t row = (own.before + t) * values;
        for (int64_t v = 0; v < values; v += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(own.errors.data() + t * values + v),
                                           _mm512_set1_ps(-own.gates[t].theta));
            _mm512_storeu_ps(own.steps.data() + row + v, _mm512_mul_ps(x, _mm512_set1_ps(own.share[t])));
            _mm512_storeu_ps(own.moved.data() + row + v, _mm512_mul_ps(x, _mm512_set1_ps(own.weight[t])));
        }
    }
    move(own, before + length, static_cast<float>(fading.keep), weights, to);
    for (int64_t t = 0; t < length; ++t)  // so that what is kept does not depend on where chunks begin
        if (own.gates[t].theta == 0) std::fill_n(own.along(t), features, 0.0f);
    own.pass(length);
}

}  // namespace
