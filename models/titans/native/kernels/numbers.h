// Sixteen numbers at a time.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace {

__m512 widen(const uint16_t *x) {  // 16 bfloat16
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

void narrow(__m512 x, uint16_t *to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

__m512 widen(const int8_t *x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x))));
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

__m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
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

}  // namespace
