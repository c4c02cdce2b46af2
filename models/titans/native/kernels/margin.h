// Whether a query asks for what was written, or for something like it: `titans.memory.margin`, of one head.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "memory.h"
#include "protection.h"

namespace {

class Told {  // the last keys that a head wrote well, as queries are compared with them
  public:
    Told(const Memory &m)
        : dim(m.key_dim), products(m.products), room(m.protected_keys), features(m.features()), own(products + dim),
          nearest(features) {}

    void take(const int8_t *of_head) {  // [N, K + 1], before the first one zeros; they are to stay
        const int64_t missing = num_missing(of_head, room, dim);
        kept = of_head + missing * (dim + 1);
        count = room - missing;
        alike.resize(TOGETHER * count);
        scale.resize(count);
        for (int64_t i = 0; i < count; ++i) scale[i] = 1 / std::max(length(widened(i)), 1.0f);
    }

    void margins(const Memory &m, const float *queries, int64_t some, float *found) {  // [some, F], of unit length
        if (count == room) {
            std::fill_n(found, some, std::numeric_limits<float>::infinity());
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            float common[TOGETHER];
            if (some == TOGETHER) compare<TOGETHER>(widened(i), queries, common);
            else
                for (int64_t n = 0; n < some; ++n) compare<1>(widened(i), queries + n * features, common + n);
            for (int64_t n = 0; n < some; ++n) alike[n * count + i] = scale[i] * common[n];
        }
        for (int64_t n = 0; n < some; ++n) found[n] = margin(m, alike.data() + n * count);
    }

  private:
    int64_t dim, products, room, features, count = 0;
    const int8_t *kept = nullptr;
    std::vector<float> alike, scale;  // [TOGETHER, count]: how like queries and keys are; [count]: makes no key too long
    std::vector<float> own, nearest;

    float margin(const Memory &m, const float *alike) {
        const int64_t top = std::max_element(alike, alike + count) - alike;
        if (!count || alike[top] <= 0) return 0;
        expand_kept(m, kept + top * (dim + 1), 1.0f, own, nearest.data());
        float itself, same, rival = 0;
        compare<1>(widened(top), nearest.data(), &itself);
        for (int64_t i = 0; i < count; ++i) {
            if (i == top || alike[i] <= rival) continue;  // most are less alike than the worst rival so far
            compare<1>(widened(i), nearest.data(), &same);
            const float share = scale[i] * same / (scale[top] * itself);
            rival = std::max(rival, alike[i] * (1 - std::clamp(share, 0.0f, 1.0f)));
        }
        return (alike[top] - rival) / std::sqrt(alike[top]);
    }

    const float *widened(int64_t key) {  // [K], its last floats also before the first ones, which they are neighbours of
        float *made_of = own.data() + products;
        dequantize(kept + key * (dim + 1), dim, made_of);
        std::copy_n(made_of + dim - products, products, own.data());
        return made_of;
    }

    // What each of N x [F] and a key have in common: what `expand` makes of the key is not written down.
    template <int N> void compare(const float *made_of, const float *x, float *common) const {
        __m512 total[N];
        for (int n = 0; n < N; ++n) total[n] = _mm512_setzero_ps();
        for (int64_t k = 0; k < dim; k += 16) {
            const __m512 y = _mm512_loadu_ps(made_of + k);
            __m512 with_neighbours[N];
            for (int n = 0; n < N; ++n)
                with_neighbours[n] = products ? _mm512_setzero_ps() : _mm512_loadu_ps(x + n * features + k);
            for (int64_t i = 1; i <= products; ++i) {
                const __m512 neighbour = _mm512_loadu_ps(made_of + k - i);
                for (int n = 0; n < N; ++n) {
                    const __m512 asked = _mm512_loadu_ps(x + n * features + (i - 1) * dim + k);
                    with_neighbours[n] = _mm512_fmadd_ps(neighbour, asked, with_neighbours[n]);
                }
            }
            for (int n = 0; n < N; ++n) total[n] = _mm512_fmadd_ps(y, with_neighbours[n], total[n]);
        }
        for (int n = 0; n < N; ++n) common[n] = _mm512_reduce_add_ps(total[n]);
    }

    float length(const float *made_of) const {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t k = 0; k < dim; k += 16) {
            const __m512 y = _mm512_loadu_ps(made_of + k), square = _mm512_mul_ps(y, y);
            if (!products) squares = _mm512_add_ps(squares, square);
            for (int64_t i = 1; i <= products; ++i) {
                const __m512 neighbour = _mm512_loadu_ps(made_of + k - i);
                squares = _mm512_fmadd_ps(square, _mm512_mul_ps(neighbour, neighbour), squares);
            }
        }
        return std::sqrt(_mm512_reduce_add_ps(squares));
    }
};

}  // namespace
