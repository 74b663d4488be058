import Foundation
import LlamaCommon
import llama

/// Why something could not be measured, in one line.
public struct BenchError: Error, CustomStringConvertible {
    public let description: String

    init(_ description: String) { self.description = description }
}

/// What computes.
public enum Backend: String, Sendable {
    case cpu
    /// All that llama.cpp finds beside the processor: Metal on Apple's systems.
    case gpu
}

/// An open file, with the settings that `phoneready bench` has: mapped weights, a cache of f16.
final class LlamaSession {
    static let batch: UInt32 = 2048
    static let microBatch: UInt32 = 512

    private let path: String
    private let model: OpaquePointer
    private let context: OpaquePointer
    private let vocabulary: OpaquePointer
    let weightBuffers: [String: Int]
    let flashAttention: Bool?

    init(path: String, nContext: Int, nThreads: Int, backend: Backend) throws {
        self.path = path
        LlamaLog.shared.clear()
        var settings = llama_model_default_params()
        settings.load_mode = LLAMA_LOAD_MODE_MMAP
        settings.n_gpu_layers = backend == .gpu ? -1 : 0
        // Without a list llama.cpp would take what it finds for large products.
        var none: [ggml_backend_dev_t?] = [nil]
        model = try none.withUnsafeMutableBufferPointer { devices in
            if backend == .cpu { settings.devices = devices.baseAddress }
            guard let model = llama_model_load_from_file(path, settings) else {
                throw BenchError("llama.cpp cannot load \(path): \(LlamaLog.shared.reason)")
            }
            return model
        }
        vocabulary = llama_model_get_vocab(model)
        var choices = llama_context_default_params()
        choices.n_ctx = UInt32(nContext)
        choices.n_batch = min(Self.batch, choices.n_ctx)
        choices.n_ubatch = min(Self.microBatch, choices.n_batch)
        choices.n_threads = Int32(nThreads)
        choices.n_threads_batch = Int32(nThreads)
        choices.no_perf = true
        guard let context = llama_init_from_model(model, choices) else {
            llama_model_free(model)
            throw BenchError("llama.cpp cannot make a context of \(nContext) tokens: \(LlamaLog.shared.reason)")
        }
        self.context = context
        weightBuffers = LlamaLog.shared.weightBuffers
        flashAttention = LlamaLog.shared.flashAttention
    }

    deinit {
        llama_free(context)
        llama_model_free(model)
    }

    /// llama.cpp's description of the model, bytes of its weights, and how many there are.
    var facts: (type: String, size: UInt64, parameters: UInt64) {
        var name = [CChar](repeating: 0, count: 256)
        llama_model_desc(model, &name, name.count)
        return (String(cString: name), llama_model_size(model), llama_model_n_params(model))
    }

    /// What holds, and so multiplies, the weights.
    var backends: String {
        let others = weightBuffers.keys.filter { !$0.hasPrefix("CPU") && !$0.hasPrefix("AMX") }.sorted()
        return others.isEmpty ? "CPU" : others.joined(separator: ", ")
    }

    func clear() { llama_memory_clear(llama_get_memory(context), true) }

    func decode(_ tokens: [llama_token]) throws {
        guard readInBatches(tokens, context) else {
            throw BenchError("llama.cpp cannot run \(path): \(LlamaLog.shared.reason)")
        }
        llama_synchronize(context)
    }

    func tokenize(_ text: String) throws -> [llama_token] {
        let length = Int32(text.utf8.count)
        var tokens = [llama_token](repeating: 0, count: Int(length) + 8)
        let count = llama_tokenize(vocabulary, text, length, &tokens, Int32(tokens.count), true, true)
        guard count >= 0 else { throw BenchError("llama.cpp cannot tokenize a text of \(length) bytes") }
        return Array(tokens[..<Int(count)])
    }

    /// The likeliest next token.
    func sample() -> llama_token {
        let logits = UnsafeBufferPointer(
            start: llama_get_logits_ith(context, -1), count: Int(llama_vocab_n_tokens(vocabulary)))
        return llama_token(logits.indices.max { logits[$0] < logits[$1] } ?? 0)
    }

    func randomTokens(seed: UInt32, count: Int) throws -> [llama_token] {
        var random = PythonRandom(seed: seed)
        let size = UInt32(llama_vocab_n_tokens(vocabulary))
        var tokens = (0..<count).map { _ in llama_token(random.below(size)) }
        let bos = llama_vocab_bos(vocabulary)
        if count > 0, try tokenize("").first == bos {
            tokens[0] = bos
        }
        return tokens
    }
}
