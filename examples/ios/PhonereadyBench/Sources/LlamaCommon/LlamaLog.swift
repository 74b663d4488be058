import Foundation
import llama

/// llama.cpp's log: what it last complained about, and what it tells nowhere else of how it computes.
package final class LlamaLog: @unchecked Sendable {
    package static let shared = LlamaLog()
    private let lock = NSLock()
    private var open = ""
    private var warnings: [String] = []
    private var worth = false
    private var buffers: [String: Int] = [:]
    private var flash: Bool?

    /// Begin anew, for a file that is opened next.
    package func clear() {
        lock.withLock { (buffers, flash, warnings) = ([:], nil, []) }
    }

    /// Bytes of the weights by the buffer that holds them.
    package var weightBuffers: [String: Int] { lock.withLock { buffers } }
    /// Whether llama.cpp chose its flash kernel; nil where it did not say.
    package var flashAttention: Bool? { lock.withLock { flash } }
    package var reason: String {
        lock.withLock { warnings.isEmpty ? "llama.cpp gave no reason" : warnings.suffix(3).joined(separator: "; ") }
    }

    package static func listen() {
        llama_log_set({ level, text, _ in
            if let text { LlamaLog.shared.add(level, String(cString: text)) }
        }, nil)
    }

    private func add(_ level: ggml_log_level, _ text: String) {
        lock.withLock {
            if level != GGML_LOG_LEVEL_CONT {
                worth = level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR
            }
            open += text
            while let end = open.firstIndex(of: "\n") {
                endLine(String(open[..<end]))
                open = String(open[open.index(after: end)...])
            }
        }
    }

    private func endLine(_ line: String) {
        if let mark = line.range(of: " model buffer size = ") {
            let name = line[..<mark.lowerBound].split(separator: " ").last.map(String.init) ?? ""
            let mebibytes = line[mark.upperBound...].split(separator: " ").first.flatMap { Double($0) } ?? 0
            buffers[name, default: 0] += Int((mebibytes * 1_048_576).rounded())
        }
        if line.contains("Flash Attention enabled") {
            flash = true
        } else if line.contains("Flash Attention not supported") {
            flash = false
        }
        if worth, !line.trimmingCharacters(in: .whitespaces).isEmpty {
            warnings = (warnings + [line.trimmingCharacters(in: .whitespaces)]).suffix(20)
        }
    }
}
