/// Python's `random.Random(seed).randrange(n)`: the tokens are those of `phoneready bench`.
///
/// Mersenne Twister, Matsumoto and Nishimura 1998, seeded by init_by_array as CPython does.
struct PythonRandom {
    private static let size = 624
    private static let shift = 397
    private var state = [UInt32](repeating: 0, count: PythonRandom.size)
    private var index = PythonRandom.size

    init(seed: UInt32) {
        state[0] = 19_650_218
        for i in 1..<Self.size {
            state[i] = 1_812_433_253 &* (state[i - 1] ^ (state[i - 1] >> 30)) &+ UInt32(i)
        }
        var i = 1
        for _ in 0..<Self.size {
            state[i] = (state[i] ^ (before(i) &* 1_664_525)) &+ seed
            i = step(i)
        }
        for _ in 1..<Self.size {
            state[i] = (state[i] ^ (before(i) &* 1_566_083_941)) &- UInt32(i)
            i = step(i)
        }
        state[0] = 0x8000_0000
    }

    mutating func below(_ limit: UInt32) -> UInt32 {
        let bits = UInt32(32 - limit.leadingZeroBitCount)
        var value = next() >> (32 - bits)
        while value >= limit {
            value = next() >> (32 - bits)
        }
        return value
    }

    private func before(_ i: Int) -> UInt32 { state[i - 1] ^ (state[i - 1] >> 30) }

    private mutating func step(_ i: Int) -> Int {
        if i + 1 < Self.size {
            return i + 1
        }
        state[0] = state[Self.size - 1]
        return 1
    }

    private mutating func next() -> UInt32 {
        if index == Self.size {
            for k in 0..<Self.size {
                let y = (state[k] & 0x8000_0000) | (state[(k + 1) % Self.size] & 0x7fff_ffff)
                state[k] = state[(k + Self.shift) % Self.size] ^ (y >> 1) ^ (y & 1 == 0 ? 0 : 0x9908_b0df)
            }
            index = 0
        }
        var y = state[index]
        index += 1
        y ^= y >> 11
        y ^= (y << 7) & 0x9d2c_5680
        y ^= (y << 15) & 0xefc6_0000
        return y ^ (y >> 18)
    }
}
