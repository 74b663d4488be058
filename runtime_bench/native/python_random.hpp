// Random tokens: those of the Python worker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace runner {

// Python's random.Random(seed).randrange(n): the tokens are those of the Python worker.
// Mersenne Twister, Matsumoto and Nishimura 1998, seeded by init_by_array as CPython does.
class PythonRandom {
  public:
    explicit PythonRandom(uint64_t seed) {
        std::vector<uint32_t> key = {static_cast<uint32_t>(seed)};
        if (seed >> 32) {
            key.push_back(static_cast<uint32_t>(seed >> 32));
        }
        fill(19650218U);
        size_t i = 1;
        size_t j = 0;
        for (size_t k = kSize; k; --k) {
            state_[i] = (state_[i] ^ (before(i) * 1664525U)) + key[j] + static_cast<uint32_t>(j);
            i = step(i);
            j = (j + 1) % key.size();
        }
        for (size_t k = kSize - 1; k; --k) {
            state_[i] = (state_[i] ^ (before(i) * 1566083941U)) - static_cast<uint32_t>(i);
            i = step(i);
        }
        state_[0] = 0x80000000U;
    }

    uint32_t below(uint32_t limit) {
        int bits = 0;
        while (bits < 32 && (limit >> bits)) {
            ++bits;
        }
        uint32_t value;
        do {
            value = next() >> (32 - bits);
        } while (value >= limit);
        return value;
    }

  private:
    static constexpr size_t kSize = 624;
    static constexpr size_t kShift = 397;

    void fill(uint32_t seed) {
        state_[0] = seed;
        for (size_t i = 1; i < kSize; ++i) {
            state_[i] = 1812433253U * (state_[i - 1] ^ (state_[i - 1] >> 30)) + static_cast<uint32_t>(i);
        }
    }
    uint32_t before(size_t i) const { return state_[i - 1] ^ (state_[i - 1] >> 30); }
    size_t step(size_t i) {
        if (++i >= kSize) {
            state_[0] = state_[kSize - 1];
            return 1;
        }
        return i;
    }
    uint32_t next() {
        if (index_ == kSize) {
            for (size_t k = 0; k < kSize; ++k) {
                const uint32_t y = (state_[k] & 0x80000000U) | (state_[(k + 1) % kSize] & 0x7fffffffU);
                state_[k] = state_[(k + kShift) % kSize] ^ (y >> 1) ^ ((y & 1U) ? 0x9908b0dfU : 0U);
            }
            index_ = 0;
        }
        uint32_t y = state_[index_++];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680U;
        y ^= (y << 15) & 0xefc60000U;
        return y ^ (y >> 18);
    }
    uint32_t state_[kSize];
    size_t index_ = kSize;
};

}  // namespace runner
