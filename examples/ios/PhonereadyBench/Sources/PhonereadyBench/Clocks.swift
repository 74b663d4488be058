import Foundation

#if canImport(Darwin)
    import Darwin

    private let wallClock = CLOCK_UPTIME_RAW
    /// Goes on while the machine sleeps.
    private let bootClock = CLOCK_MONOTONIC_RAW
#else
    import Glibc

    private let wallClock = CLOCK_MONOTONIC
    private let bootClock = CLOCK_BOOTTIME
#endif

/// Nanoseconds by a clock of the system.
enum Clocks {
    static func wall() -> Int { read(wallClock) }
    static func sinceBoot() -> Int { read(bootClock) }
    static func processor() -> Int { read(CLOCK_PROCESS_CPUTIME_ID) }

    private static func read(_ clock: clockid_t) -> Int {
        var now = timespec()
        clock_gettime(clock, &now)
        return Int(now.tv_sec) * 1_000_000_000 + Int(now.tv_nsec)
    }
}
