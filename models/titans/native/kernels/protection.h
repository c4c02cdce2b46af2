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

// How many rows of [N, K] are zeros before the first one that is not.
int64_t num_missing(const uint16_t *rows, int64_t count, int64_t dim) {
    const __m256i but_signs = _mm256_set1_epi16(0x7fff);
    for (int64_t i = 0; i < count * dim; i += 16)
        if (!_mm256_testz_si256(but_signs, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(rows + i)))) return i / dim;
    return count;
}

// A key that is kept [K], as the memory sees it [F], and not longer than `longest`: a state may be anyone's.
float expand_kept(const Memory &m, const uint16_t *made_of, float longest, std::vector<float> &own, float *to) {
    own.resize(m.products + m.key_dim);
    for (int64_t k = 0; k < m.key_dim; k += 16) _mm512_storeu_ps(own.data() + m.products + k, widen(made_of + k));
    const float length = expand(m, own.data() + m.products, to), by = longest / std::max(length, longest);
    for (int64_t f = 0; f < m.features(); f += 16)
        _mm512_storeu_ps(to + f, _mm512_mul_ps(_mm512_set1_ps(by), _mm512_loadu_ps(to + f)));
    return length * by;
}

class Kept {  // the last keys that a head wrote well
  public:
    Kept(const Memory &m)
        : room(m.protected_keys), dim(m.key_dim), features(m.features()), products(m.products), made_of(room * dim) {}

    int64_t size() const { return room * dim; }

    void take(const uint16_t *kept) {  // [N, K], the last one at the end; before the first one zeros
        const int64_t missing = num_missing(kept, room, dim);
        std::copy(kept + missing * dim, kept + size(), made_of.data());
        count = room - missing;
        first = 0;
        known = false;
    }

    void give(uint16_t *kept) const {
        const auto cut = made_of.begin() + first * dim, end = made_of.begin() + count * dim;
        uint16_t *there = std::fill_n(kept, (room - count) * dim, uint16_t{0});
        std::copy(made_of.begin(), cut, std::copy(cut, end, there));
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
        const int64_t slot = count < room ? count++ : first;
        if (count == room) first = (slot + 1) % room;
        for (int64_t k = 0; k < dim; k += 16)
            narrow(_mm512_mul_ps(_mm512_set1_ps(by), _mm512_loadu_ps(factors + k)), made_of.data() + slot * dim + k);
        expand_row(m, slot);
        with_each(rows.data(), count, features, rows.data() + slot * features, some.data());
        for (int64_t i = 0; i < count; ++i) alike[slot * padded + i] = alike[i * padded + slot] = some[i];
    }

  private:
    int64_t room, dim, features, products, padded = 0;
    int64_t count = 0, first = 0;     // of those there are the oldest is in slot `first`
    bool known = false;               // whether rows are there
    std::vector<uint16_t> made_of;    // [N, K]
    std::vector<float> rows, alike;   // [N, F], and each with each: [N, padded]
    std::vector<float> own, some, solved, left, towards, image;

    void expand_row(const Memory &m, int64_t i) {
        expand_kept(m, made_of.data() + i * dim, std::sqrt(m.most_weight), own, rows.data() + i * features);
    }

    void expand_all(const Memory &m) {
        padded = (room + 15) / 16 * 16;
        rows.resize(room * features);
        alike.assign(room * padded, 0);
        for (auto *x : {&some, &solved, &left, &towards, &image}) x->assign(padded, 0);
        for (int64_t i = 0; i < count; ++i) expand_row(m, i);
        for (int64_t i = 0; i < count; ++i) {
            with_each(rows.data(), i + 1, features, rows.data() + i * features, some.data());
            for (int64_t j = 0; j <= i; ++j) alike[i * padded + j] = alike[j * padded + i] = some[j];
        }
        std::fill(some.begin(), some.end(), 0.0f);
        known = true;
    }

    int64_t in_use() const { return (count + 15) / 16 * 16; }  // floats of what has one for each key; past them zeros

    float product(const std::vector<float> &x, const std::vector<float> &y) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < in_use(); i += 16)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(x.data() + i), _mm512_loadu_ps(y.data() + i), sum);
        return _mm512_reduce_add_ps(sum);
    }

    void add(float by, const std::vector<float> &x, std::vector<float> &to) const {
        for (int64_t i = 0; i < in_use(); i += 16)
            _mm512_storeu_ps(to.data() + i, _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(x.data() + i),
                                                            _mm512_loadu_ps(to.data() + i)));
    }

    // (P k + slack k) / (k^T P k + slack), P k = k - R^T (I + R R^T)^-1 R k by conjugate gradients.
    void turn(const Memory &m, const float *key, float *direction) {
        constexpr int STEPS = 20;
        with_each(rows.data(), count, features, key, left.data());
        std::fill(solved.begin(), solved.end(), 0.0f);
        towards = left;
        const float all = product(left, left);
        float remains = all;
        for (int step = 0; step < STEPS && remains > 1e-14f * all; ++step) {
            for (int64_t i = 0; i < count; ++i) with_each(alike.data() + i * padded, 1, in_use(), towards.data(), &image[i]);
            add(1, towards, image);
            const float by = remains / product(towards, image), before = remains;
            add(by, towards, solved);
            add(-by, image, left);
            remains = product(left, left);
            for (int64_t i = 0; i < in_use(); ++i) towards[i] = left[i] + remains / before * towards[i];
        }
        std::copy_n(key, features, direction);
        for (int64_t i = 0; i < count; ++i) {
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
