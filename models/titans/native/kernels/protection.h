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

// A key that is kept in eight bits, [K + 1] (`titans.memory.quantization`), as the floats that it is made of [K].
void dequantize(const int8_t *row, int64_t dim, float *to) {
    const __m512 scale = _mm512_set1_ps(std::exp2(row[dim] / 8.0f));
    for (int64_t k = 0; k < dim; k += 16) _mm512_storeu_ps(to + k, _mm512_mul_ps(scale, widen(row + k)));
}

void quantize(const float *x, int64_t dim, int8_t *row) {
    constexpr float MOST = 127.0f, LEAST = 0x1p-16f;
    __m512 largest = _mm512_setzero_ps();
    for (int64_t k = 0; k < dim; k += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + k)));
    const float most = _mm512_reduce_max_ps(largest);
    float steps = std::clamp(std::ceil(8.0f * std::log2(std::max(most, LEAST) / MOST)), -128.0f, 127.0f);
    if (most < LEAST) steps = 0;
    const __m512 by = _mm512_set1_ps(std::exp2(steps / 8.0f));
    for (int64_t k = 0; k < dim; k += 16) {
        const __m512i y = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + k), by));
        const __m512i least = _mm512_set1_epi32(-127);  // (what is more than 127 the conversion makes that)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(row + k), _mm512_cvtsepi32_epi8(_mm512_max_epi32(y, least)));
    }
    row[dim] = static_cast<int8_t>(steps);
}

// How many rows of [N, K + 1] are zeros before the first one that is not.
int64_t num_missing(const int8_t *rows, int64_t count, int64_t dim) {
    const int64_t size = count * (dim + 1);
    int64_t i = 0;
    while (i + 64 <= size && !_mm512_test_epi8_mask(_mm512_loadu_si512(rows + i), _mm512_set1_epi8(-1))) i += 64;
    while (i < size && !rows[i]) ++i;
    return i / (dim + 1);
}

// A key that is kept as the memory sees it [F], and not longer than `longest`: a state may be anyone's. Its length.
// `own` has room for what it is made of, and as many floats as there are products before it.
float expand_kept(const Memory &m, const int8_t *row, float longest, std::vector<float> &own, float *to) {
    dequantize(row, m.key_dim, own.data() + m.products);
    const float length = expand(m, own.data() + m.products, to), by = longest / std::max(length, longest);
    for (int64_t f = 0; f < m.features(); f += 16)
        _mm512_storeu_ps(to + f, _mm512_mul_ps(_mm512_set1_ps(by), _mm512_loadu_ps(to + f)));
    return length * by;
}

// Products of each of N x [width] with 16 / N rows, which stand `stride` apart: to[n] from `at` on.
template <int N>
void products_with(const float *const *x, const float *rows, int64_t stride, int64_t width, float *const *to, int64_t at) {
    constexpr int R = 16 / N;
    __m512 total[16];
    for (__m512 &sum : total) sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += 16) {
        __m512 row[R];
        for (int r = 0; r < R; ++r) row[r] = _mm512_loadu_ps(rows + r * stride + k);
        for (int n = 0; n < N; ++n) {
            const __m512 one = _mm512_loadu_ps(x[n] + k);
            for (int r = 0; r < R; ++r) total[n * R + r] = _mm512_fmadd_ps(one, row[r], total[n * R + r]);
        }
    }
    alignas(64) float found[16];
    _mm512_store_ps(found, sums(total));
    for (int n = 0; n < N; ++n) std::copy_n(found + n * R, R, to[n] + at);
}

// Products of `some` x [width] with `count` rows, a multiple of 16; each is as alone to the last bit.
void products_with_each(const float *const *x, int64_t some, const float *rows, int64_t count, int64_t stride, int64_t width,
                        float *const *to) {
    int64_t n = 0;
    const auto together = [&]<int N>() {
        for (; n + N <= some; n += N)
            for (int64_t i = 0; i < count; i += 16 / N) products_with<N>(x + n, rows + i * stride, stride, width, to + n, i);
    };
    together.template operator()<8>();
    together.template operator()<4>();
    together.template operator()<2>();
    together.template operator()<1>();
}

struct Token {  // that a head writes
    const float *key, *factors;  // [F], and [K] that expand to it times `size`
    float size, theta;
    float *along;  // [F]: the direction in which it is learnt

    // How far that is not the key's own: faint steps do little harm.
    float turned(const Memory &m) const { return std::clamp(2 * theta / static_cast<float>(m.least_step) - 1, 0.0f, 1.0f); }
};

class Kept {  // the last keys that a head wrote well
  public:
    static constexpr int64_t AT_ONCE = 8;  // tokens whose directions are found at once: what there is is read once for them

    Kept(const Memory &m)
        : room(m.protected_keys), dim(m.key_dim), features(m.features()), products(m.products), own(products + dim) {}

    int64_t size() const { return room * (dim + 1); }

    // From [N, K + 1], the last one at the end and before the first one zeros; `most` tokens will be learnt.
    void take(const int8_t *from, int64_t most) {
        const int64_t missing = num_missing(from, room, dim);
        written = room - missing;
        slots = std::min(room, written + most) + AT_ONCE;
        kept.resize(slots * (dim + 1));
        std::copy(from + missing * (dim + 1), from + size(), kept.data());
        known = false;
    }

    void give(int8_t *to) const {
        const int64_t count = std::min(room, written);
        to = std::fill_n(to, (room - count) * (dim + 1), int8_t{0});
        for (int64_t i = written - count; i < written; ++i) to = std::copy_n(kept.data() + i % slots * (dim + 1), dim + 1, to);
    }

    void learn(const Memory &m, const Token *tokens, int64_t count) {
        const Token *some[AT_ONCE];
        int64_t num = 0;
        for (int64_t t = 0; t < count; ++t) {
            if (tokens[t].turned(m) == 0) std::copy_n(tokens[t].key, features, tokens[t].along);
            else some[num++] = tokens + t;
            if (num == AT_ONCE || (num && t + 1 == count)) {
                turn(m, some, num);
                num = 0;
            }
        }
    }

  private:
    int64_t room, dim, features, products;
    int64_t written = 0, slots = 0, padded = 0;  // row i is in slot i % slots, of those written the last `room` count
    bool known = false;                          // whether rows are there
    std::vector<int8_t> kept;                    // [slots, K + 1]
    std::vector<float> rows, alike, lengths;     // [padded, F], each with each [padded, padded], and [padded]
    std::vector<float> own;                      // [products + K]

    struct Solving {  // for one token: what each row has of it; [padded], zeros where no row is in sight
        std::vector<float> firm, solved, left, towards, weighed, image;
        int64_t before;  // rows that were written before it
        float all, remains;
    } solving[AT_ONCE];

    int64_t in_use() const { return (std::min(written, slots) + 15) / 16 * 16; }

    void expand_row(const Memory &m, int64_t slot) {
        const int8_t *row = kept.data() + slot * (dim + 1);
        lengths[slot] = expand_kept(m, row, std::sqrt(m.most_weight), own, rows.data() + slot * features);
    }

    void expand_all(const Memory &m) {
        padded = (slots + 15) / 16 * 16;
        rows.resize(padded * features);  // what is there of another head is finite, and nothing makes use of it
        alike.resize(padded * padded);
        lengths.resize(padded);
        for (Solving &of : solving)
            for (auto *x : {&of.firm, &of.solved, &of.left, &of.towards, &of.weighed, &of.image}) x->resize(padded);
        for (int64_t i = 0; i < written; ++i) expand_row(m, i);
        for (int64_t i = 0; i < written; i += AT_ONCE) relate(i, std::min(i + AT_ONCE, written), (i + AT_ONCE + 15) / 16 * 16);
        known = true;
    }

    // The rows written from `begin` on with those in the first `count` slots, a multiple of 16.
    void relate(int64_t begin, int64_t end, int64_t count) {
        const float *x[AT_ONCE];
        float *to[AT_ONCE];
        for (int64_t i = begin; i < end; ++i) {
            x[i - begin] = rows.data() + i % slots * features;
            to[i - begin] = alike.data() + i % slots * padded;
        }
        products_with_each(x, end - begin, rows.data(), count, features, features, to);
        for (int64_t i = begin; i < end; ++i)
            for (int64_t j = 0; j < count; ++j) alike[j * padded + i % slots] = to[i - begin][j];
    }

    void keep(const Memory &m, const Token &token) {
        const float well = std::min<float>(token.theta / static_cast<float>(m.least_step) - 1, 1);
        if (well <= 0) return;
        const float weight = well * token.theta / std::max<float>(1 - token.theta, 1 / m.most_weight);
        const float as_large = std::sqrt(weight) / token.size, by = products ? std::sqrt(as_large) : as_large;
        const int64_t slot = written++ % slots;
        for (int64_t k = 0; k < dim; k += 16)
            _mm512_storeu_ps(own.data() + k, _mm512_mul_ps(_mm512_set1_ps(by), _mm512_loadu_ps(token.factors + k)));
        quantize(own.data(), dim, kept.data() + slot * (dim + 1));
        expand_row(m, slot);
    }

    float product(const std::vector<float> &x, const std::vector<float> &y) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < in_use(); i += 16)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(x.data() + i), _mm512_loadu_ps(y.data() + i), sum);
        return _mm512_reduce_add_ps(sum);
    }

    // (P k + slack k) / (k^T P k + slack), P k = k - R^T (I + R R^T)^-1 R k by conjugate gradients, R the rows in sight of a
    // token, each times the root of how firm it is.
    void turn(const Memory &m, const Token *const *tokens, int64_t count) {
        constexpr int STEPS = 40;
        if (!known) expand_all(m);
        const int64_t begin = written;
        for (int64_t n = 0; n < count; ++n) {
            solving[n].before = written;
            keep(m, *tokens[n]);
        }
        relate(begin, written, in_use());
        const float *asked[AT_ONCE];
        float *to[AT_ONCE];
        for (int64_t n = 0; n < count; ++n) asked[n] = tokens[n]->key, to[n] = solving[n].left.data();
        products_with_each(asked, count, rows.data(), in_use(), features, features, to);
        for (int64_t n = 0; n < count; ++n) start(m, solving[n]);
        for (int step = 0; step < STEPS; ++step) {
            Solving *under_way[AT_ONCE];
            int64_t num = 0;
            for (int64_t n = 0; n < count; ++n) {
                Solving &of = solving[n];
                if (of.remains <= 1e-14f * of.all) continue;
                for (int64_t i = 0; i < in_use(); ++i) of.weighed[i] = of.firm[i] * of.towards[i];
                asked[num] = of.weighed.data(), to[num] = of.image.data(), under_way[num++] = &of;
            }
            if (!num) break;
            products_with_each(asked, num, alike.data(), in_use(), padded, in_use(), to);
            for (int64_t n = 0; n < num; ++n) go_on(*under_way[n]);
        }
        for (int64_t n = 0; n < count; ++n) finish(m, solving[n], *tokens[n]);
    }

    void start(const Memory &m, Solving &of) {
        const int64_t oldest = std::max<int64_t>(0, of.before - room);
        std::fill(of.firm.begin(), of.firm.end(), 0.0f);
        for (int64_t i = oldest; i < of.before; ++i) {
            const int64_t slot = i % slots;
            const double cosine = of.left[slot] / std::max(lengths[slot], 1e-30f);
            of.firm[slot] = std::sqrt(m.firmness * std::clamp((m.same - cosine) / (m.same - m.another), 0.0, 1.0));
        }
        for (int64_t i = 0; i < in_use(); ++i) of.left[i] *= of.firm[i];
        std::fill(of.solved.begin(), of.solved.end(), 0.0f);
        of.towards = of.left;
        of.all = of.remains = product(of.left, of.left);
    }

    void go_on(Solving &of) {
        for (int64_t i = 0; i < in_use(); ++i) of.image[i] = of.towards[i] + of.firm[i] * of.image[i];
        const float by = of.remains / product(of.towards, of.image), before = of.remains;
        for (int64_t i = 0; i < in_use(); ++i) of.solved[i] += by * of.towards[i];
        for (int64_t i = 0; i < in_use(); ++i) of.left[i] -= by * of.image[i];
        of.remains = product(of.left, of.left);
        for (int64_t i = 0; i < in_use(); ++i) of.towards[i] = of.left[i] + of.remains / before * of.towards[i];
    }

    void finish(const Memory &m, const Solving &of, const Token &token) {
        std::copy_n(token.key, features, token.along);
        for (int64_t i = 0; i < std::min(written, slots); ++i) {
            const float share = of.firm[i] * of.solved[i];
            if (share == 0) continue;
            const __m512 by = _mm512_set1_ps(-share);
            for (int64_t f = 0; f < features; f += 16)
                _mm512_storeu_ps(token.along + f, _mm512_fmadd_ps(by, _mm512_loadu_ps(rows.data() + i * features + f),
                                                                  _mm512_loadu_ps(token.along + f)));
        }
        float own;
        with_each(token.along, 1, features, token.key, &own);
        const __m512 slack = _mm512_set1_ps(m.slack), by = _mm512_set1_ps(1 / (own + static_cast<float>(m.slack)));
        const __m512 turned = _mm512_set1_ps(token.turned(m));
        for (int64_t f = 0; f < features; f += 16) {
            const __m512 key = _mm512_loadu_ps(token.key + f), free = _mm512_loadu_ps(token.along + f);
            const __m512 whole = _mm512_mul_ps(by, _mm512_fmadd_ps(slack, key, free));
            _mm512_storeu_ps(token.along + f, _mm512_fmadd_ps(turned, _mm512_sub_ps(whole, key), key));
        }
    }
};

}  // namespace
