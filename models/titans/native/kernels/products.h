// Products of a few rows with large matrices, whose weights lie in blocks of 16 outputs, and in a block in groups of 32
// inputs, so that a product reads them from the first byte to the last. Three kinds:
//
//     FOUR     256 bytes of codes, then 16 steps and 16 lowest levels in half precision: w = code * step + lowest
//     EIGHT    512 bytes of codes, then 16 steps in float32: w = (code - 128) * step
//     SIXTEEN  1024 bytes: pairs of inputs in bfloat16
//
// Codes meet inputs in fixed point, 16 bits with one scale a row: two bytes, each of which is multiplied with four codes
// at once (VNNI). A group's sum is exact. By its norm a row is nearer so than in bfloat16: fifty times where it is
// normally distributed, and where one of 1,536 inputs is far above all others, which is the worst, still four times.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "numbers.h"
#include "threads.h"

namespace {

constexpr int BLOCK = 16;
constexpr int GROUP = 32;
constexpr float LARGEST = 127 * 256;  // of what has a high and a low byte
constexpr float SMALLEST = 1e-30f;    // rows below it are 0: their scale has no inverse

enum Kind : int64_t { FOUR = 4, EIGHT = 8, SIXTEEN = 16 };

struct Matrix {
    int64_t kind, num_outputs, num_inputs;
    const uint8_t *data;

    int64_t group_bytes() const { return kind == FOUR ? 320 : kind == EIGHT ? 576 : 1024; }
    const uint8_t *block(int64_t b) const { return data + b * (num_inputs / GROUP) * group_bytes(); }
};

struct Inputs {  // rows of a product, as matrices of codes take them, of bfloat16, or both
    bool codes = false, pairs = false;
    std::vector<int8_t> high, low;    // [R, K]: x = (256 high + low) * scale
    std::vector<float> scales;        // [R]
    std::vector<int32_t> sums;        // [R, K / 32], of 256 high + low
    std::vector<uint16_t> rounded;    // [R, K] bfloat16

    void resize(int64_t rows, int64_t most_inputs) {
        high.resize(codes ? rows * most_inputs : 0);
        low.resize(high.size());
        scales.resize(codes ? rows : 0);
        sums.resize(high.size() / GROUP);
        rounded.resize(pairs ? rows * most_inputs : 0);
    }

    void take(int64_t row, const float *x, int64_t num_inputs) {
        if (codes) fix(row, x, num_inputs);
        if (pairs)
            for (int64_t k = 0; k < num_inputs; k += 16)
                narrow(_mm512_loadu_ps(x + k), rounded.data() + row * num_inputs + k);
    }

  private:
    void fix(int64_t row, const float *x, int64_t num_inputs) {
        __m512 most = _mm512_setzero_ps();
        __mmask16 no_numbers = 0;
        for (int64_t k = 0; k < num_inputs; k += 16) {
            const __m512 y = _mm512_loadu_ps(x + k);
            most = _mm512_max_ps(most, _mm512_abs_ps(y));
            no_numbers |= _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
        }
        const float largest = _mm512_reduce_max_ps(most);
        const bool finite = !no_numbers && largest <= std::numeric_limits<float>::max();
        const __m512 by = _mm512_set1_ps(finite && largest > SMALLEST ? LARGEST / largest : 0.0f);
        scales[row] = finite ? largest / LARGEST : std::numeric_limits<float>::quiet_NaN();
        const auto half_group = [&](int64_t k) {
            const __m512i all = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), by));
            const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(all, _mm512_set1_epi32(128)), 8);
            const __m512i lower = _mm512_sub_epi32(all, _mm512_slli_epi32(upper, 8));
            const int64_t at = row * num_inputs + k;
            _mm_storeu_si128(reinterpret_cast<__m128i *>(high.data() + at), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(low.data() + at), _mm512_cvtepi32_epi8(lower));
            return all;
        };
        for (int64_t k = 0; k < num_inputs; k += GROUP)
            sums[(row * num_inputs + k) / GROUP] =
                _mm512_reduce_add_epi32(_mm512_add_epi32(half_group(k), half_group(k + 16)));
    }
};

template <class T> __m512i broadcast(const T *x) {  // four bytes
    int word;
    std::memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

// Of R rows and B blocks, what one group adds: four codes of each output at a time with four inputs of each row.
template <int R, int B> struct Sums {
    __m512i high[R][B], low[R][B];

    Sums() {
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) high[r][b] = low[r][b] = _mm512_setzero_si512();
    }

    void add(const __m512i (&codes)[B], const Inputs &x, int64_t at, int64_t num_inputs) {
        for (int r = 0; r < R; ++r) {
            const __m512i upper = broadcast(x.high.data() + r * num_inputs + at);
            const __m512i lower = broadcast(x.low.data() + r * num_inputs + at);
            for (int b = 0; b < B; ++b) {
                high[r][b] = _mm512_dpbusd_epi32(high[r][b], codes[b], upper);
                low[r][b] = _mm512_dpbusd_epi32(low[r][b], codes[b], lower);
            }
        }
    }

    __m512i whole(int r, int b) const { return _mm512_add_epi32(_mm512_slli_epi32(high[r][b], 8), low[r][b]); }
};

constexpr int AHEAD = 4;  // blocks: a processor's own foresight ends with each, so memory is asked for the next ones' codes

void fetch(const uint8_t *x, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += 64) _mm_prefetch(x + i, _MM_HINT_T0);
}

template <int R, int B>
void four(const Matrix &m, int64_t block, const Inputs &x, int64_t row, __m512 (&total)[R][B]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int64_t num_groups = m.num_inputs / GROUP;
    for (int64_t g = 0; g < num_groups; ++g) {
        Sums<R, B> sums;
        const uint8_t *at[B];
        for (int b = 0; b < B; ++b) {
            at[b] = m.block(block + b) + g * 320;
            if (!row) fetch(at[b] + AHEAD * num_groups * 320, 320);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m512i codes[B];
            for (int b = 0; b < B; ++b) {
                const __m512i both = _mm512_loadu_si512(at[b] + 64 * (i / 2));
                codes[b] = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(both, 4) : both, nibble);
            }
            sums.add(codes, x, row * m.num_inputs + g * GROUP + 4 * i, m.num_inputs);
        }
        for (int b = 0; b < B; ++b) {
            const __m512 step = half(at[b] + 256), lowest = half(at[b] + 288);
            for (int r = 0; r < R; ++r) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(x.sums[(row + r) * num_groups + g]));
                total[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.whole(r, b)), step, total[r][b]);
                total[r][b] = _mm512_fmadd_ps(lowest, sum, total[r][b]);
            }
        }
    }
}

template <int R, int B>
void eight(const Matrix &m, int64_t block, const Inputs &x, int64_t row, __m512 (&total)[R][B]) {
    const int64_t num_groups = m.num_inputs / GROUP;
    for (int64_t g = 0; g < num_groups; ++g) {
        Sums<R, B> sums;
        const uint8_t *at[B];
        for (int b = 0; b < B; ++b) {
            at[b] = m.block(block + b) + g * 576;
            if (!row) fetch(at[b] + AHEAD * num_groups * 576, 576);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m512i codes[B];
            for (int b = 0; b < B; ++b) codes[b] = _mm512_loadu_si512(at[b] + 64 * i);
            sums.add(codes, x, row * m.num_inputs + g * GROUP + 4 * i, m.num_inputs);
        }
        for (int r = 0; r < R; ++r) {
            const __m512i shift = _mm512_set1_epi32(128 * x.sums[(row + r) * num_groups + g]);
            for (int b = 0; b < B; ++b) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums.whole(r, b), shift));
                total[r][b] = _mm512_fmadd_ps(sum, _mm512_loadu_ps(at[b] + 512), total[r][b]);
            }
        }
    }
}

template <int R, int B>
void sixteen(const Matrix &m, int64_t block, const Inputs &x, int64_t row, __m512 (&total)[R][B]) {
    const uint8_t *at[B];
    for (int b = 0; b < B; ++b) at[b] = m.block(block + b);
    for (int64_t k = 0; k < m.num_inputs; k += 2)
        for (int r = 0; r < R; ++r) {
            const __m512bh v = pairs(broadcast(x.rounded.data() + (row + r) * m.num_inputs + k));
            for (int b = 0; b < B; ++b)
                total[r][b] = _mm512_dpbf16_ps(total[r][b], pairs(_mm512_loadu_si512(at[b] + 32 * k)), v);
        }
}

template <int R, int B, class Take>
void tile(const Matrix &m, int64_t block, const Inputs &x, int64_t row, Take &&take) {
    __m512 total[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) total[r][b] = _mm512_setzero_ps();
    if (m.kind == FOUR) four<R, B>(m, block, x, row, total);
    else if (m.kind == EIGHT) eight<R, B>(m, block, x, row, total);
    else sixteen<R, B>(m, block, x, row, total);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            const __m512 scale = _mm512_set1_ps(m.kind == SIXTEEN ? 1.0f : x.scales[row + r]);
            take(row + r, (block + b) * BLOCK, _mm512_mul_ps(total[r][b], scale));
        }
}

// The outputs of some blocks for all rows; `take` is given a row, the first of 16 outputs and these.
template <int B, class Take>
void some_blocks(const Matrix &m, int64_t block, const Inputs &x, int64_t rows, Take &&take) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
        if constexpr (B == 4) {
            tile<4, 2>(m, block, x, row, take);
            tile<4, 2>(m, block + 2, x, row, take);
        } else {
            tile<4, B>(m, block, x, row, take);
        }
    }
    for (; row + 2 <= rows; row += 2) tile<2, B>(m, block, x, row, take);
    for (; row < rows; ++row) tile<1, B>(m, block, x, row, take);
}

template <class Take>
void multiply(const Matrix &m, Share blocks, const Inputs &x, int64_t rows, Take &&take) {
    int64_t block = blocks.begin;
    for (; block + 4 <= blocks.end; block += 4) some_blocks<4>(m, block, x, rows, take);
    for (; block + 2 <= blocks.end; block += 2) some_blocks<2>(m, block, x, rows, take);
    for (; block < blocks.end; ++block) some_blocks<1>(m, block, x, rows, take);
}

// One product by itself, of rows in bfloat16.
template <class Take> void product(Team &team, const Matrix &m, int64_t rows, const uint16_t *x, Take &&take) {
    const bool codes = m.kind != SIXTEEN;
    Inputs inputs{.codes = codes, .pairs = !codes};
    inputs.resize(rows, m.num_inputs);
    team.run([&](int index) {
        const Share ours = team.share(rows, index);
        std::vector<float> row(m.num_inputs);
        for (int64_t r = ours.begin; r < ours.end; ++r) {
            for (int64_t k = 0; k < m.num_inputs; k += 16)
                _mm512_storeu_ps(row.data() + k, widen(x + r * m.num_inputs + k));
            inputs.take(r, row.data(), m.num_inputs);
        }
        team.barrier.wait();
        multiply(m, team.share(m.num_outputs / BLOCK, index), inputs, rows, take);
    });
}

}  // namespace
