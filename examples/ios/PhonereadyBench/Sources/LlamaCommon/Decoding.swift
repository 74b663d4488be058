import llama

/// Have a context read tokens, a batch at a time.
///
/// - Returns: Whether llama.cpp could compute all of them; if not, `LlamaLog` has its reason.
package func readInBatches(_ tokens: [llama_token], _ context: OpaquePointer) -> Bool {
    let most = Int(llama_n_batch(context))
    return stride(from: 0, to: tokens.count, by: most).allSatisfy { start in
        var part = Array(tokens[start..<min(start + most, tokens.count)])
        return part.withUnsafeMutableBufferPointer {
            llama_decode(context, llama_batch_get_one($0.baseAddress, Int32($0.count))) == 0
        }
    }
}
