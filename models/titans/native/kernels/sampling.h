// From a row of scores to a token: `titans.sampling` is the reference. Where nothing cuts tokens off, a vocabulary is
// passed twice and nothing of its size is written; where something does, those near the likeliest are gathered, further
// and further down, until it is certain that what may be drawn is among them.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t STRETCH = 1'024;   // tokens whose probabilities are added up together
constexpr float NEAR = 4;            // nats below the likeliest that are gathered first,
constexpr float FARTHER = 1.5f;      // and how much farther down when that is not enough
constexpr float FAR = 87;            // nats below the likeliest, where float32 has no probability

struct Choice {  // what decides a row's token, beside its scores
    double temperature, top_p, min_p, chance;
    int64_t top_k;  // 0: all
    int64_t num_changes;
    const int64_t *changed;  // tokens
    const float *changes;    // what is added to their scores
};

__mmask16 lanes(int64_t left) { return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << left) - 1); }

class Row {
  public:
    Row(float *scores, int64_t size, const Choice &choice) : scores_(scores), size_(size), choice_(choice) {
        for (int64_t i = 0; i < choice.num_changes; ++i) {
            before_.push_back(scores[choice.changed[i]]);
            scores[choice.changed[i]] += choice.changes[i];
        }
        __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t i = 0; i < size; i += 16)
            most = _mm512_mask_max_ps(most, lanes(size - i), most, _mm512_maskz_loadu_ps(lanes(size - i), scores + i));
        most_ = _mm512_reduce_max_ps(most);
    }

    ~Row() {
        for (int64_t i = choice_.num_changes; i-- > 0;) scores_[choice_.changed[i]] = before_[i];
    }

    int64_t draw() const {
        if (choice_.temperature == 0) return likeliest();
        const bool cuts = choice_.min_p > 0 || (choice_.top_k > 0 && choice_.top_k < size_);
        return cuts || choice_.top_p < 1 ? of_few(cuts) : of_all();
    }

  private:
    struct Candidate {
        float below, probability;  // nats below the likeliest, as a number of 0 or less; times a constant
        int64_t token;
    };

    int64_t likeliest() const {  // the first one of several
        for (int64_t i = 0; i < size_; i += 16) {
            const __mmask16 here = lanes(size_ - i);
            const __m512 x = _mm512_maskz_loadu_ps(here, scores_ + i);
            if (const unsigned found = _mm512_mask_cmp_ps_mask(here, x, _mm512_set1_ps(most_), _CMP_EQ_OQ))
                return i + __builtin_ctz(found);
        }
        return 0;
    }

    __m512 below(int64_t i) const {  // what lies past the end is far below
        const __m512 far = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        const __m512 x = _mm512_mask_loadu_ps(far, lanes(size_ - i), scores_ + i);
        const __m512 temperature = _mm512_set1_ps(static_cast<float>(choice_.temperature));
        return _mm512_div_ps(_mm512_sub_ps(x, _mm512_set1_ps(most_)), temperature);
    }

    static __m512 probabilities(__m512 below) {
        const __mmask16 some = _mm512_cmp_ps_mask(below, _mm512_set1_ps(-FAR), _CMP_GT_OQ);
        return _mm512_maskz_mov_ps(some, exponential(below));
    }

    double mass(int64_t begin, int64_t end) const {
        __m512d total = _mm512_setzero_pd();
        for (int64_t i = begin; i < end; i += 16) {
            const __m512 p = probabilities(below(i));
            total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_castps512_ps256(p)));
            total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_extractf32x8_ps(p, 1)));
        }
        return _mm512_reduce_add_pd(total);
    }

    int64_t of_all() const {  // in the vocabulary's order
        std::vector<double> reached;
        for (int64_t i = 0; i < size_; i += STRETCH)
            reached.push_back(mass(i, std::min(i + STRETCH, size_)) + (reached.empty() ? 0 : reached.back()));
        const double drawn = choice_.chance * reached.back();
        const int64_t stretch = std::upper_bound(reached.begin(), reached.end() - 1, drawn) - reached.begin();
        double so_far = stretch ? reached[stretch - 1] : 0;
        int64_t token = stretch * STRETCH;
        for (int64_t i = stretch * STRETCH; i < std::min((stretch + 1) * STRETCH, size_); i += 16) {
            float p[16];
            _mm512_storeu_ps(p, probabilities(below(i)));
            for (int64_t lane = 0; lane < 16 && i + lane < size_; ++lane) {
                if (p[lane] > 0) token = i + lane;  // the last one that can be, should sums differ in their last bit
                if ((so_far += p[lane]) > drawn) return token;
            }
        }
        return token;
    }

    int64_t of_few(bool cuts) const {  // the likeliest first
        const int64_t top_k = choice_.top_k > 0 ? std::min(choice_.top_k, size_) : size_;
        const float least = choice_.min_p > 0 ? static_cast<float>(std::log(choice_.min_p)) : -FAR;
        const double wanted = cuts ? 0 : choice_.top_p * mass(0, size_);
        std::vector<Candidate> found;
        double total = 0;
        for (float depth = -NEAR;; depth *= FARTHER) {
            const bool is_all = depth <= least;
            found.clear();
            gather(is_all ? least : depth, found);
            total = 0;
            for (const Candidate &x : found) total += x.probability;
            if (is_all || (cuts ? top_k < size_ && static_cast<int64_t>(found.size()) >= top_k : total >= wanted)) break;
        }
        std::sort(found.begin(), found.end(), [](const Candidate &a, const Candidate &b) {
            return a.below != b.below ? a.below > b.below : a.token < b.token;
        });
        if (static_cast<int64_t>(found.size()) > top_k) found.resize(top_k);
        while (!found.empty() && found.back().below < least) found.pop_back();
        if (found.empty()) return likeliest();  // not with finite scores
        if (cuts) {
            total = 0;
            for (const Candidate &x : found) total += x.probability;
        } else {
            total = wanted / choice_.top_p;
        }
        double kept = 0;  // the first ones, up to where they reach top_p; one at least
        size_t count = 0;
        while (count < found.size() && (!count || choice_.top_p == 1 || kept < choice_.top_p * total))
            kept += found[count++].probability;
        const double drawn = choice_.chance * kept;
        double so_far = 0;
        for (size_t i = 0; i < count; ++i)
            if ((so_far += found[i].probability) > drawn) return found[i].token;
        return found[count - 1].token;
    }

    void gather(float depth, std::vector<Candidate> &found) const {
        for (int64_t i = 0; i < size_; i += 16) {
            const __m512 x = below(i);
            unsigned near = _mm512_mask_cmp_ps_mask(lanes(size_ - i), x, _mm512_set1_ps(depth), _CMP_GE_OQ);
            if (!near) continue;
            float nats[16], p[16];
            _mm512_storeu_ps(nats, x);
            _mm512_storeu_ps(p, probabilities(x));
            for (; near; near &= near - 1) {
                const int lane = __builtin_ctz(near);
                found.push_back({nats[lane], p[lane], i + lane});
            }
        }
    }

    float *scores_;
    const int64_t size_;
    const Choice &choice_;
    std::vector<float> before_;
    float most_;
};

}  // namespace
