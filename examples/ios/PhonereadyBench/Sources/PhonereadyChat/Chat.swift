import Foundation
import LlamaCommon
import llama

/// Someone's turn: `system`, `user` or `assistant`.
public struct Message: Sendable {
    public let role: String
    public let content: String

    public init(_ role: String, _ content: String) { (self.role, self.content) = (role, content) }
}

/// What the model said, and whether the context was full before the turn ended.
public struct Answer: Sendable {
    public let text: String
    public let cut: Bool
}

/// How a token is drawn: at a temperature of 0 the likeliest. The same seed draws the same.
public struct Sampling: Sendable {
    public var temperature: Float = 0
    public var topP: Float = 1
    public var seed: UInt32 = 1

    public init() {}
}

/// Why there is no answer, in one line.
public struct ChatError: Error, CustomStringConvertible {
    public let description: String

    init(_ description: String) { self.description = description }
}

/// A GGUF file that answers.
///
/// llama.cpp's library knows the usual chat templates by their look, not what else one of them does: where a conversation
/// has no system message, SmolLM2's own template adds one, and here nothing does. Control tokens are read in what people
/// write, too: an app that must not let them end a turn takes them out before.
public actor Chat {
    private let room: Int
    private let model: OpaquePointer
    private let vocabulary: OpaquePointer
    private let context: OpaquePointer
    private let chain: UnsafeMutablePointer<llama_sampler>
    /// What the context has read.
    private var held: [llama_token] = []

    /// - Parameters:
    ///   - contextTokens: What the conversation and its answer may have; memory is taken for all of them.
    ///   - threads: As many as the processor has fast cores. Layers go to Metal where there is one.
    public init(file: URL, contextTokens: Int = 2048, threads: Int = 4, sampling: Sampling = Sampling()) throws {
        guard contextTokens > 0, threads > 0 else { throw ChatError("contextTokens and threads are above 0") }
        guard FileManager.default.isReadableFile(atPath: file.path) else { throw ChatError("cannot read \(file.path)") }
        LlamaLog.listen()
        LlamaLog.shared.clear()
        guard let model = llama_model_load_from_file(file.path, llama_model_default_params()) else {
            throw ChatError("cannot load \(file.lastPathComponent): \(LlamaLog.shared.reason)")
        }
        guard contextTokens <= Int(llama_model_n_ctx_train(model)) else {
            llama_model_free(model)
            throw ChatError("the model has learnt contexts of up to \(llama_model_n_ctx_train(model)) tokens")
        }
        var settings = llama_context_default_params()
        settings.n_ctx = UInt32(contextTokens)
        settings.n_batch = 512
        settings.n_threads = Int32(threads)
        settings.n_threads_batch = Int32(threads)
        settings.swa_full = true  // a cache of the window alone cannot be cut where conversations part
        guard let context = llama_init_from_model(model, settings) else {
            llama_model_free(model)
            throw ChatError("cannot make room for \(contextTokens) tokens: \(LlamaLog.shared.reason)")
        }
        let chain = llama_sampler_chain_init(llama_sampler_chain_default_params())!
        let parts =
            sampling.temperature > 0
            ? [
                llama_sampler_init_top_p(sampling.topP, 1), llama_sampler_init_temp(sampling.temperature),
                llama_sampler_init_dist(sampling.seed),
            ] : [llama_sampler_init_greedy()]
        parts.forEach { llama_sampler_chain_add(chain, $0) }
        (room, self.model, self.context, self.chain) = (contextTokens, model, context, chain)
        vocabulary = llama_model_get_vocab(model)
    }

    deinit {
        llama_sampler_free(chain)
        llama_free(context)
        llama_model_free(model)
    }

    /// What the model says next. What it shares with the conversation before is not read again, unless the model keeps
    /// states that cannot be cut.
    ///
    /// - Parameter onText: Gets the text as it comes, whole characters; false ends the answer.
    public func answer(
        _ messages: [Message], onText: @Sendable (String) -> Bool = { _ in true }
    ) throws -> Answer {
        try begin(messages)
        var text = ""
        var characters = Characters()
        var cut = false
        while true {
            let token = llama_sampler_sample(chain, context, -1)
            if llama_vocab_is_eog(vocabulary, token) { break }
            let piece = characters.of(spelled(token))
            text += piece
            if !piece.isEmpty, !onText(piece) { return Answer(text: text, cut: false) }
            if held.count >= room {
                cut = true
                break
            }
            try read([token])
        }
        let rest = characters.rest()
        if !rest.isEmpty { _ = onText(rest) }
        return Answer(text: text + rest, cut: cut)
    }

    /// Read a conversation; of what the context holds already, the beginning that is the same is kept.
    private func begin(_ messages: [Message]) throws {
        let tokens = tokenized(try rendered(messages))
        guard !tokens.isEmpty, tokens.count < room else {
            throw ChatError("the conversation takes \(tokens.count) tokens, and the context has \(room)")
        }
        // The last token is read again even where all are the same: what follows it is wanted.
        let same = zip(held, tokens.dropLast()).prefix { $0 == $1 }.count
        forget(from: same)
        llama_sampler_reset(chain)
        try read(Array(tokens[held.count...]))
    }

    private func rendered(_ messages: [Message]) throws -> [UInt8] {
        guard let style = llama_model_chat_template(model, nil) else { throw ChatError("the file has no chat template") }
        let texts = messages.map { (strdup($0.role)!, strdup($0.content)!) }
        defer { texts.forEach { free($0.0); free($0.1) } }
        let turns = texts.map { llama_chat_message(role: $0.0, content: $0.1) }
        let size = llama_chat_apply_template(style, turns, turns.count, true, nil, 0)
        guard size >= 0 else { throw ChatError("llama.cpp's library does not know the file's chat template") }
        var text = [CChar](repeating: 0, count: Int(size) + 1)
        llama_chat_apply_template(style, turns, turns.count, true, &text, Int32(text.count))
        return text.dropLast().map { UInt8(bitPattern: $0) }
    }

    private func tokenized(_ text: [UInt8]) -> [llama_token] {
        text.withUnsafeBytes { bytes in
            let start = bytes.bindMemory(to: CChar.self).baseAddress
            let size = Int32(bytes.count)
            let count = -llama_tokenize(vocabulary, start, size, nil, 0, true, true)
            guard count > 0 else { return [] }
            var tokens = [llama_token](repeating: 0, count: Int(count))
            llama_tokenize(vocabulary, start, size, &tokens, count, true, true)
            return tokens
        }
    }

    private func spelled(_ token: llama_token) -> [UInt8] {
        var text = [CChar](repeating: 0, count: 64)
        var size = llama_token_to_piece(vocabulary, token, &text, Int32(text.count), 0, false)
        if size < 0 {
            text = [CChar](repeating: 0, count: Int(-size))
            size = llama_token_to_piece(vocabulary, token, &text, Int32(text.count), 0, false)
        }
        return text[..<Int(size)].map { UInt8(bitPattern: $0) }
    }

    /// The states of recurrent models and convolutions hold all that was read: they cannot be cut, and all is read anew.
    private func forget(from position: Int) {
        guard position < held.count else { return }
        let memory = llama_get_memory(context)
        if llama_memory_seq_rm(memory, 0, llama_pos(position), -1) {
            held.removeSubrange(position...)
        } else {
            llama_memory_clear(memory, true)
            held = []
        }
    }

    private func read(_ tokens: [llama_token]) throws {
        guard readInBatches(tokens, context) else {
            llama_memory_clear(llama_get_memory(context), true)
            held = []
            throw ChatError("cannot compute: \(LlamaLog.shared.reason)")
        }
        held += tokens
    }
}

/// Text of bytes that come token by token: a character may begin in one and end in the next.
struct Characters {
    private var open: [UInt8] = []

    mutating func of(_ bytes: [UInt8]) -> String {
        open += bytes
        let whole = open.count - Self.begun(open)
        defer { open.removeFirst(whole) }
        return String(decoding: open[..<whole], as: UTF8.self)
    }

    /// What has begun and did not end.
    func rest() -> String { String(decoding: open, as: UTF8.self) }

    /// Bytes at the end that are the beginning of a character.
    private static func begun(_ bytes: [UInt8]) -> Int {
        for count in 1...3 where count <= bytes.count {
            let byte = bytes[bytes.count - count]
            if byte & 0b1100_0000 == 0b1000_0000 { continue }
            let size = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1
            return size > count ? count : 0
        }
        return 0
    }
}
