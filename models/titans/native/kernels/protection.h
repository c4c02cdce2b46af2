// In which direction a token is learnt, so that what was written last stays: `titans.memory.protection`, of one head.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace {

class Kept {  // the last keys that a head wrote well
  public:
    Kept(const Memory &m)
        : room(m.protected_keys), dim(m.key_dim), features(m.features()), products(m.products),
          padded((room + 15) / 16 * 16), made_of(room * dim) {}

    int64_t size() const { return room * dim; }

    void take(const uint16_t *kept) {  // [N, K], the last one at the end
        std::copy_n(kept, size(), made_of.data());
        first = 0;
        known = false;
    }

    void give(uint16_t *kept) const {
        const auto cut = made_of.begin() + first * dim;
        std::copy(made_of.begin(), cut, std::copy(cut, made_of.end(), kept));
    }

    // Where a key [F], made of factors [K] that expand to `size`, is learnt with a step theta: the direction [F].
    void learn(const Memory &m, const float *key, const float *factors, float size, float theta, float *direction) {
        if (theta == 0) {
            std::copy_n(key, features, direction);
            return;
        }
        if (!known) expand_all(m);
        turn(m, key, direction);
        const float well = std::min<float>(theta / static_cast<float>(m.least_step) - 1, 1);
        if (well <= 0) return;
        const float weight = well * theta / std::max<float>(1 - theta, 1 / m.most_weight);
        const float own = std::sqrt(weight) / size, by = products ? std::sqrt(own) : own;
        for (int64_t k = 0; k < dim; k += 16)
            narrow(_mm512_mul_ps(_mm512_set1_ps(by), _mm512_loadu_ps(factors + k)), made_of.data() + first * dim + k);
        expand_row(m, first);
        with_each(rows.data(), room, features, rows.data() + first * features, some.data());
        for (int64_t i = 0; i < room; ++i) alike[first * padded + i] = alike[i * padded + first] = some[i];
        first = (first + 1) % room;
    }

  private:
    int64_t room, dim, features, products, padded, first = 0;  // the oldest is in slot `first`
    bool known = false;                                         // whether rows are there
    std::vector<uint16_t> made_of;                              // [N, K]
    std::vector<float> rows, alike;                             // [N, F], and each with each: [N, padded]
    std::vector<float> own, some, solved, left, towards, image;

    void expand_row(const Memory &m, int64_t i) {
        for (int64_t k = 0; k < dim; k += 16)
            _mm512_storeu_ps(own.data() + products + k, widen(made_of.data() + i * dim + k));
        float *row = rows.data() + i * features, longest = std::sqrt(m.most_weight);
        const float by = longest / std::max(expand(m, own.data() + products, row), longest);
        for (int64_t f = 0; f < features; f += 16)  // (a state may be anyone's)
            _mm512_storeu_ps(row + f, _mm512_mul_ps(_mm512_set1_ps(by), _mm512_loadu_ps(row + f)));
    }

    void expand_all(const Memory &m) {
        rows.resize(room * features);
        alike.assign(room * padded, 0);
        own.resize(products + dim);
        for (auto *x : {&some, &solved, &left, &towards, &image}) x->assign(padded, 0);
        for (int64_t i = 0; i < room; ++i) expand_row(m, i);
        for (int64_t i = 0; i < room; ++i) {
            with_each(rows.data(), i + 1, features, rows.data() + i * features, some.data());
            for (int64_t j = 0; j <= i; ++j) alike[i * padded + j] = alike[j * padded + i] = some[j];
        }
        known = true;
    }

    float product(const std::vector<float> &x, const std::vector<float> &y) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < padded; i += 16)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(x.data() + i), _mm512_loadu_ps(y.data() + i), sum);
        return _mm512_reduce_add_ps(sum);
    }

    void add(float by, const std::vector<float> &x, std::vector<float> &to) const {
        for (int64_t i = 0; i < padded; i += 16)
            _mm512_storeu_ps(to.data() + i, _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(x.data() + i),
                                                            _mm512_loadu_ps(to.data() + i)));
    }

    // (P k + slack k) / (k^T P k + slack), P k = k - R^T (I + R R^T)^-1 R k by conjugate gradients.
    void turn(const Memory &m, const float *key, float *direction) {
        constexpr int STEPS = 20;
        with_each(rows.data(), room, features, key, left.data());
        std::fill(solved.begin(), solved.end(), 0.0f);
        towards = left;
        const float all = product(left, left);
        float remains = all;
        for (int step = 0; step < STEPS && remains > 1e-14f * all; ++step) {
            with_each(alike.data(), room, padded, towards.data(), image.data());
            add(1, towards, image);
            const float by = remains / product(towards, image), before = remains;
            add(by, towards, solved);
            add(-by, image, left);
            remains = product(left, left);
            for (int64_t i = 0; i < padded; ++i) towards[i] = left[i] + remains / before * towards[i];
        }
        std::copy_n(key, features, direction);
        for (int64_t i = 0; i < room; ++i) {
            const __m512 by = _mm512_set1_ps(-solved[i]);
            for (int64_t f = 0; f < features; f += 16)
                _mm512_storeu_ps(direction + f, _mm512_fmadd_ps(by, _mm512_loadu_ps(rows.data() + i * features + f),
                                                                _mm512_loadu_ps(direction + f)));
        }
        float free;
        with_each(direction, 1, features, key, &free);
        const __m512 slack = _mm512_set1_ps(m.slack), by = _mm512_set1_ps(1 / (free + static_cast<float>(m.slack)));
        for (int64_t f = 0; f < features; f += 16) {
            const __m512 x = _mm512_fmadd_ps(slack, _mm512_loadu_ps(key + f), _mm512_loadu_ps(direction + f));
            _mm512_storeu_ps(direction + f, _mm512_mul_ps(by, x));
        }
    }
};

}  // namespace
