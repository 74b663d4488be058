import Foundation

#if canImport(Darwin)
    import Darwin
#endif
#if canImport(UIKit)
    import UIKit
#endif

/// What the system tells of the machine and of this process; nil is what it does not tell.
enum Machine {
    #if os(iOS)
        static let system = "iOS"
    #elseif os(macOS)
        static let system = "macOS"
    #else
        static let system = "Linux"
    #endif

    #if arch(arm64)
        static let instructions = "arm64"
    #elseif arch(x86_64)
        static let instructions = "x86_64"
    #else
        static let instructions = "unknown"
    #endif

    static var version: String {
        let found = ProcessInfo.processInfo.operatingSystemVersion
        return "\(found.majorVersion).\(found.minorVersion).\(found.patchVersion)"
    }

    #if canImport(Darwin)
        /// A phone's model identifier, such as iPhone15,2: its processors' names are shared. A Mac's processor.
        #if os(iOS)
            static var processor: String? {
                ProcessInfo.processInfo.environment["SIMULATOR_MODEL_IDENTIFIER"].map { "\($0), simulated" }
                    ?? text("hw.machine")
            }
        #else
            static var processor: String? { text("machdep.cpu.brand_string") }
        #endif

        /// Most resident memory of this process so far, and what it has now, in bytes.
        static var memory: (peak: Int, now: Int)? {
            var info = mach_task_basic_info()
            var count = mach_msg_type_number_t(MemoryLayout<mach_task_basic_info>.size / MemoryLayout<natural_t>.size)
            let status = withUnsafeMutablePointer(to: &info) { pointer in
                pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                    task_info(mach_task_self_, task_flavor_t(MACH_TASK_BASIC_INFO), $0, &count)
                }
            }
            return status == KERN_SUCCESS ? (Int(info.resident_size_max), Int(info.resident_size)) : nil
        }

        /// As Android numbers it: 0 is none, 3 severe, 4 critical. Apple names four states.
        static var thermalStatus: Int? {
            switch ProcessInfo.processInfo.thermalState {
            case .nominal: 0
            case .fair: 1
            case .serious: 3
            case .critical: 4
            @unknown default: nil
            }
        }

        static var lowPower: Bool? { ProcessInfo.processInfo.isLowPowerModeEnabled }

        private static func text(_ name: String) -> String? {
            var size = 0
            guard sysctlbyname(name, nil, &size, nil, 0) == 0, size > 1 else { return nil }
            var bytes = [CChar](repeating: 0, count: size)
            return sysctlbyname(name, &bytes, &size, nil, 0) == 0 ? String(cString: bytes) : nil
        }
    #else
        static var processor: String? { field("/proc/cpuinfo", "model name") }

        static var memory: (peak: Int, now: Int)? {
            guard let peak = kilobytes("VmHWM"), let now = kilobytes("VmRSS") else { return nil }
            return (peak, now)
        }

        static var thermalStatus: Int? { nil }
        static var lowPower: Bool? { nil }

        private static func kilobytes(_ name: String) -> Int? {
            field("/proc/self/status", name)?.split(separator: " ").first.flatMap { Int($0) }.map { $0 * 1024 }
        }

        private static func field(_ file: String, _ name: String) -> String? {
            guard let text = try? String(contentsOfFile: file, encoding: .utf8) else { return nil }
            let line = text.split(separator: "\n").first { $0.hasPrefix(name) }
            return line?.split(separator: ":").last.map { $0.trimmingCharacters(in: .whitespaces) }
        }
    #endif

    #if os(iOS)
        /// Whether power comes from outside.
        static var charging: Bool? {
            DispatchQueue.main.sync {
                MainActor.assumeIsolated {
                    UIDevice.current.isBatteryMonitoringEnabled = true
                    let state = UIDevice.current.batteryState
                    return state == .unknown ? nil : state != .unplugged
                }
            }
        }
    #else
        static var charging: Bool? { nil }
    #endif
}
