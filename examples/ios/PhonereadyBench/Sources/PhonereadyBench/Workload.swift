/// What is timed, in llama-bench's terms.
public struct Workload: Sendable, Hashable {
    public enum Kind: String, Sendable {
        /// Prompt processing: random tokens, logits of the last one only.
        case prompt = "pp"
        /// Token generation: random tokens one at a time.
        case generation = "tg"
        /// Time to first token: a text tokenized and processed, its first token sampled greedily.
        case firstToken = "ttft"
    }

    public let kind: Kind
    /// Tokens of the prompt, or tokens generated.
    public let size: Int

    public init(_ kind: Kind, _ size: Int) {
        self.kind = kind
        self.size = size
    }

    var nPrompt: Int { kind == .generation ? 0 : size }
    var nGen: Int { kind == .prompt ? 0 : kind == .generation ? size : 1 }
    /// Tokens of context that it needs.
    var nContext: Int { nPrompt + nGen }
    /// As tables write it. One process takes several samples, so the regime is the one that is called warm.
    var test: String { "\(kind.rawValue)\(size) @ \(Workload.regime)" }

    static let regime = "warm"
}
