import XCTest

@testable import PhonereadyBench

final class PythonRandomTests: XCTestCase {
    /// What CPython's `random.Random(seed).randrange(limit)` gives.
    func testNumbersArePythons() {
        let known: [(seed: UInt32, limit: UInt32, numbers: [UInt32])] = [
            (0, 384, [197, 215, 20, 132, 261, 248]),
            (7, 49152, [21222, 9886, 25875, 42659, 3164, 4747]),
        ]
        for (seed, limit, numbers) in known {
            var random = PythonRandom(seed: seed)
            XCTAssertEqual(numbers.map { _ in random.below(limit) }, numbers)
        }
    }
}
