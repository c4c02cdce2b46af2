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
    Told(const Memory &m) : dim(m.key_dim), products(m.products), room(m.protected_keys), own(products + dim) {}

    void take(const uint16_t *of_head) {  // [N, K], before the first one zeros; they are to stay
        const int64_t missing = num_missing(of_head, room, dim);
        kept = of_head + missing * dim;
        count = room - missing;
        for (auto *x : {&alike, &same, &scale}) x->resize(count);
    }

    float margin(const Memory &m, const float *query) {  // [F], of unit length
        if (count == room) return std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < count; ++i) {
            float length;
            alike[i] = compare(i, query, &length);
            scale[i] = 1 / std::max(length, 1.0f);
            alike[i] *= scale[i];
        }
        const int64_t top = std::max_element(alike.begin(), alike.end()) - alike.begin();
        if (!count || alike[top] <= 0) return 0;
        nearest.resize(m.features());
        expand_kept(m, kept + top * dim, 1.0f, own, nearest.data());
        float length, rival = 0;  // (the key itself is none)
        for (int64_t i = 0; i < count; ++i) same[i] = scale[i] * compare(i, nearest.data(), &length);
        for (int64_t i = 0; i < count; ++i)
            if (i != top) rival = std::max(rival, alike[i] * (1 - std::clamp(same[i] / same[top], 0.0f, 1.0f)));
        return (alike[top] - rival) / std::sqrt(alike[top]);
    }

  private:
    int64_t dim, products, room, count = 0;
    const uint16_t *kept = nullptr;
    std::vector<float> alike, same, scale;  // [count]: how like the query and the nearest key; what makes none too long
    std::vector<float> own, nearest;

    // What x [F] and a key have in common, and how long the key is: what `expand` makes of it is not written down.
    float compare(int64_t key, const float *x, float *length) {
        float *made_of = own.data() + products;
        for (int64_t k = 0; k < dim; k += 16) _mm512_storeu_ps(made_of + k, widen(kept + key * dim + k));
        std::copy_n(made_of + dim - products, products, own.data());
        __m512 common = _mm512_setzero_ps(), squares = common;
        for (int64_t i = products ? 1 : 0; i <= products; ++i)
            for (int64_t k = 0; k < dim; k += 16) {
                __m512 y = _mm512_loadu_ps(made_of + k);
                if (i) y = _mm512_mul_ps(y, _mm512_loadu_ps(made_of + k - i));
                common = _mm512_fmadd_ps(y, _mm512_loadu_ps(x + (i ? i - 1 : 0) * dim + k), common);
                squares = _mm512_fmadd_ps(y, y, squares);
            }
        *length = std::sqrt(_mm512_reduce_add_ps(squares));
        return _mm512_reduce_add_ps(common);
    }
};

}  // namespace
