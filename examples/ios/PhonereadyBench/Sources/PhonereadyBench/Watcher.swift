import Foundation

/// Looks at the machine while samples are taken, as `phoneready bench` does: twice a second.
final class Watcher: @unchecked Sendable {
    private static let interval = 0.5
    private struct Look {
        let at: Int
        let thermal: Int?
        let lowPower: Bool?
        let charging: Bool?
    }
    private let lock = NSLock()
    private var looks: [Look] = []
    private let done = DispatchSemaphore(value: 0)
    private let ended = DispatchSemaphore(value: 0)

    init() {
        look()
        let thread = Thread { [self] in
            while done.wait(timeout: .now() + Self.interval) == .timedOut { look() }
            look()
            ended.signal()
        }
        thread.start()
    }

    /// What was seen, in a record's form; no look is taken afterwards.
    ///
    /// - Parameter spans: When each sample began and ended, by `Clocks.sinceBoot`.
    func finish(spans: [(begin: Int, end: Int)]) -> [String: Any] {
        done.signal()
        ended.wait()
        let first = looks[0].at
        func seconds(_ nanoseconds: Int) -> Double { Double(nanoseconds - first) / 1e9 }
        let series: [String: [Any?]] = [
            "thermal_status": looks.map(\.thermal),
            "low_power": looks.map(\.lowPower),
            "charging": looks.map(\.charging),
        ]
        var conditions: [String: Any] = [
            "at_s": looks.map { seconds($0.at) },
            "samples_s": spans.map { [seconds($0.begin), seconds($0.end)] },
        ]
        var hidden = Dictionary(
            uniqueKeysWithValues: [
                "caps", "clocks", "hottest_c", "screen_on", "others_cores", "stolen_cores", "held_share",
            ].map { ($0, "the system shows an app none of it") })
        for (name, values) in series {
            let told = values.contains { $0 != nil }
            conditions[name] = told ? values.map { $0 ?? NSNull() } : [Any]()
            hidden[name] = told ? nil : "the system does not tell"
        }
        return conditions.merging(["hidden": hidden]) { $1 }
    }

    private func look() {
        let look = Look(
            at: Clocks.sinceBoot(), thermal: Machine.thermalStatus, lowPower: Machine.lowPower,
            charging: Machine.charging)
        lock.withLock { looks.append(look) }
    }
}
