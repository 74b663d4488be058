import Foundation
import LlamaCommon
import llama

/// What is measured and how often.
public struct BenchmarkSettings: Sendable {
    public var workloads = [Workload(.prompt, 512), Workload(.generation, 128), Workload(.firstToken, 128)]
    /// How often each file is opened anew, in turns with the others; a verdict needs five.
    public var rounds = 5
    /// Samples after each opening, behind one that does not count.
    public var samplesPerRound = 3
    /// Half the cores: of a phone's, the rest are slow ones. `phoneready bench` takes all unless it is told.
    public var nThreads = max(1, ProcessInfo.processInfo.activeProcessorCount / 2)
    public var backend = Backend.cpu
    public var seed: UInt32 = 0

    public init() {}
}

/// Measures GGUF files in turns, in llama.cpp, and appends a record of each file and workload to a file that
/// `phoneready compare` reads.
///
/// An app may start no other process: a round opens the file anew in this one, and its most memory is recorded of
/// the first opening alone, since it never falls again. Call it off the main thread, in an app that stays in the
/// foreground.
public struct Benchmark: Sendable {
    let files: [URL]
    let settings: BenchmarkSettings

    public init(files: [URL], settings: BenchmarkSettings = BenchmarkSettings()) {
        (self.files, self.settings) = (files, settings)
    }

    /// Measure, and append to `records` what is complete, workload by workload.
    ///
    /// - Parameter progress: Called with the rounds that are done, and all.
    /// - Throws: `BenchError` where a file cannot be opened or written; nothing of its workload is written then.
    public func run(records: URL, progress: (Int, Int) -> Void = { _, _ in }) throws {
        #if DEBUG
            throw BenchError("a debug build measures itself; build with -c release, or in Xcode's Release configuration")
        #else
            try measure(records: records, progress: progress)
        #endif
    }

    private func measure(records: URL, progress: (Int, Int) -> Void) throws {
        #if os(iOS)
            guard !Thread.isMainThread else { throw BenchError("run it off the main thread, as in Task.detached") }
        #endif
        guard !files.isEmpty, !settings.workloads.isEmpty, settings.rounds > 0, settings.samplesPerRound > 0,
            settings.nThreads > 0, settings.workloads.allSatisfy({ $0.size > 0 })
        else { throw BenchError("nothing to measure: files, workloads, rounds and threads must be there") }
        guard Set(files.map(\.lastPathComponent)).count == files.count else {
            throw BenchError("two files have one name, and records could not be told apart")
        }
        LlamaLog.listen()
        llama_backend_init()
        let session = UUID().uuidString
        let facts = try files.map(FileFacts.init)
        let all = settings.rounds * files.count * settings.workloads.count
        var done = 0
        for workload in settings.workloads {
            var rows = zip(files, facts).map { Row(file: $0, facts: $1, workload: workload) }
            for round in 0..<settings.rounds {
                for place in rows.indices {
                    try rows[place].measure(settings, process: round * rows.count + place)
                    done += 1
                    progress(done, all)
                }
            }
            try RecordFile.append(rows.map { $0.record(settings, session: session) }, to: records)
        }
    }
}

/// A file and a workload, with what was measured so far.
struct Row {
    let file: URL
    let facts: FileFacts
    let workload: Workload
    private(set) var started: String?
    private(set) var samples: [Int] = []
    private(set) var processor: [Int] = []
    private(set) var sequence: [Int] = []
    private(set) var loads: [Int] = []
    private(set) var baselines: [Int] = []
    private(set) var peaks: [Int] = []
    private(set) var conditions: [[String: Any]] = []
    private(set) var engine: EngineFacts?

    init(file: URL, facts: FileFacts, workload: Workload) {
        (self.file, self.facts, self.workload) = (file, facts, workload)
    }

    /// One round: the file opened anew, a run that does not count, and the samples.
    mutating func measure(_ settings: BenchmarkSettings, process: Int) throws {
        let isFirst = Opening.first()
        if let now = Machine.memory?.now { baselines.append(now) }
        started = started ?? ISO8601DateFormatter().string(from: Date())
        let watcher = Watcher()
        var spans: [(begin: Int, end: Int)] = []
        defer { conditions.append(watcher.finish(spans: spans)) }
        let began = Clocks.wall()
        let session = try LlamaSession(
            path: file.path, nContext: workload.nContext, nThreads: settings.nThreads, backend: settings.backend)
        loads.append(Clocks.wall() - began)
        let (work, warmup) = try work(of: workload, in: session, seed: settings.seed)
        session.clear()
        try warmup()
        for _ in 0..<settings.samplesPerRound {
            session.clear()
            let (wall, cpu, boot) = (Clocks.wall(), Clocks.processor(), Clocks.sinceBoot())
            try work()
            samples.append(Clocks.wall() - wall)
            processor.append(Clocks.processor() - cpu)
            spans.append((boot, Clocks.sinceBoot()))
            sequence.append(process)
        }
        engine = engine ?? EngineFacts(session)
        if isFirst, let peak = Machine.memory?.peak { peaks.append(peak) }
    }
}

/// Openings of files in this process.
private enum Opening {
    private static let lock = NSLock()
    nonisolated(unsafe) private static var any = false

    /// Whether there was none yet.
    static func first() -> Bool {
        lock.withLock {
            defer { any = true }
            return !any
        }
    }
}

/// What is timed, and what runs once before.
private func work(
    of workload: Workload, in session: LlamaSession, seed: UInt32
) throws -> (work: () throws -> Void, warmup: () throws -> Void) {
    let tokens = try session.randomTokens(seed: seed, count: workload.size)
    switch workload.kind {
    case .prompt:
        let work = { try session.decode(tokens) }
        return (work, work)
    case .generation:
        return ({ for token in tokens { try session.decode([token]) } }, { try session.decode([tokens[0]]) })
    case .firstToken:
        let text = try textOf(workload.size, in: session)
        let work = {
            try session.decode(Array(try session.tokenize(text).prefix(workload.size)))
            _ = session.sample()
        }
        return (work, work)
    }
}

/// English text of at least so many tokens and hardly more: what would be tokenized in vain is timed as well.
private func textOf(_ count: Int, in session: LlamaSession) throws -> String {
    let words = sentences.split(separator: " ")
    func first(_ n: Int) -> String { (0..<n).map { words[$0 % words.count] }.joined(separator: " ") }
    var (low, high) = (1, count)
    while try session.tokenize(first(high)).count < count { (low, high) = (high, high * 2) }
    while high > low + 1 {
        let middle = (low + high) / 2
        if try session.tokenize(first(middle)).count >= count { high = middle } else { low = middle }
    }
    return first(high)
}

/// The text of `phoneready bench` on phones (runtime_bench/native/runner.cpp).
private let sentences =
    "A small telephone on a long journey has little room for a large model, so its owner asks which parts of the model "
    + "are worth carrying. Some of them speak in almost every sentence, others wait for a word that never comes. Whoever "
    + "takes the silent ones away has to look at what is left: does it still answer as before, is it quicker, does it "
    + "need less memory, and does the battery last until the evening? One run says little, because the machine may be "
    + "warm, or busy with something else. Ten runs in turns say more, and what they say is written down together with "
    + "the day, the device, the number of threads and everything that went wrong. Then the owner compares the two, "
    + "slowly, and decides."
