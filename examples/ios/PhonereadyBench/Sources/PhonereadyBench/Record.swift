import Foundation
import llama

#if canImport(CryptoKit)
    import CryptoKit
#endif

/// A file's size and hash; the hash is nil where the system has none to compute it with.
struct FileFacts {
    let size: Int
    let sha256: String?

    init(_ file: URL) throws {
        guard let stream = try? FileHandle(forReadingFrom: file) else { throw BenchError("cannot read \(file.path)") }
        defer { try? stream.close() }
        size = try Int(stream.seekToEnd())
        try stream.seek(toOffset: 0)
        #if canImport(CryptoKit)
            var hash = SHA256()
            // Each part goes at once: all of them together are the file.
            while try autoreleasepool(invoking: {
                guard let part = try stream.read(upToCount: 1 << 24), !part.isEmpty else { return false }
                hash.update(data: part)
                return true
            }) {}
            sha256 = hash.finalize().map { String(format: "%02x", $0) }.joined()
        #else
            sha256 = nil
        #endif
    }
}

/// What an open file says of itself and of what computes it.
struct EngineFacts {
    let modelType: String
    let modelSize: UInt64
    let parameters: UInt64
    let backends: String
    let system: String
    let flashAttention: Bool?
    let weightBuffers: [String: Int]

    init(_ session: LlamaSession) {
        (modelType, modelSize, parameters) = session.facts
        (backends, flashAttention) = (session.backends, session.flashAttention)
        weightBuffers = session.weightBuffers
        system = String(cString: llama_print_system_info()).trimmingCharacters(in: CharacterSet(charactersIn: " |"))
    }
}

extension Row {
    /// The row in the form of `phoneready bench --record`. Unmeasured is null, never 0.
    func record(_ settings: BenchmarkSettings, session: String) -> [String: Any] {
        func known(_ value: Any?) -> Any { value ?? NSNull() }
        let versions = ["llama.cpp": String(cString: llama_version()), Machine.system: Machine.version]
        return [
            "schema_version": 2, "tool_version": "PhonereadyBench 1",
            "kind": "measured", "target": "app", "engine": "llama.cpp", "status": "ok", "failure": NSNull(),
            "session": session, "workload": workload.kind.rawValue, "test": workload.test, "regime": Workload.regime,
            "model_filename": file.lastPathComponent, "model_type": known(engine?.modelType),
            "model_size": known(engine?.modelSize), "model_n_params": known(engine?.parameters),
            "file_size_bytes": facts.size, "file_sha256": known(facts.sha256),
            "n_prompt": workload.nPrompt, "n_gen": workload.nGen, "n_depth": 0,
            "n_batch": LlamaSession.batch, "n_ubatch": LlamaSession.microBatch, "n_threads": settings.nThreads,
            "backends": known(engine?.backends), "cpu_info": known(Machine.processor),
            "test_time": known(started), "warmup": true, "samples_per_process": settings.samplesPerRound,
            "samples_ns": samples, "cpu_samples_ns": processor, "sequence": sequence, "load_samples_ns": loads,
            "baseline_rss_bytes": known(baselines.min()), "peak_rss_samples_bytes": peaks,
            "conditions": conditions,
            "page_cache": "as_found",
            "engine_settings": [
                "cache_type": "f16", "flash_attention": known(engine?.flashAttention),
                "weight_buffers": engine?.weightBuffers ?? [:], "asked_backend": settings.backend.rawValue,
            ],
            "environment": [
                "cpu_model": known(Machine.processor), "cpus_usable": ProcessInfo.processInfo.activeProcessorCount,
                "governor": NSNull(), "load_average": NSNull(),
                "memory_bytes": Int(ProcessInfo.processInfo.physicalMemory),
                "platform": "\(Machine.system)-\(Machine.instructions)", "versions": versions,
                "system_info": known(engine?.system),
            ],
        ]
    }
}

/// A file of records, one a line, each with its kind first.
enum RecordFile {
    private static let head = #"{"record_type":"bench","#

    /// Append lines and have them on the disk before returning; a line that a killed app left unfinished is closed.
    static func append(_ rows: [[String: Any]], to file: URL) throws {
        var text = Data()
        for row in rows {
            let fields = try JSONSerialization.data(withJSONObject: row, options: [.sortedKeys, .withoutEscapingSlashes])
            text += Data(head.utf8) + fields.dropFirst() + Data("\n".utf8)
        }
        if !FileManager.default.fileExists(atPath: file.path) {
            guard FileManager.default.createFile(atPath: file.path, contents: nil) else {
                throw BenchError("cannot write \(file.path)")
            }
        }
        guard let stream = try? FileHandle(forUpdating: file) else { throw BenchError("cannot write \(file.path)") }
        defer { try? stream.close() }
        let size = try stream.seekToEnd()
        if size > 0 {
            try stream.seek(toOffset: size - 1)
            if try stream.read(upToCount: 1) != Data("\n".utf8) { text = Data("\n".utf8) + text }
        }
        try stream.write(contentsOf: text)
        try stream.synchronize()
    }
}
