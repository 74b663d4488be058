// The library from a command line: phoneready-bench RECORDS MODEL... [--pp N] [--tg N] [--ttft N] [--rounds N]
// [--samples N] [--threads N] [--backend cpu|gpu]
import Foundation
import PhonereadyBench

func fail(_ message: String) -> Never {
    FileHandle.standardError.write(Data("error: \(message)\n".utf8))
    exit(2)
}

func number(_ option: String, _ text: String) -> Int {
    guard let value = Int(text), value > 0 else { fail("\(option): wants a number above 0 (got '\(text)')") }
    return value
}

var settings = BenchmarkSettings()
var sizes: [Workload] = []
var paths: [String] = []
var words = CommandLine.arguments.dropFirst()
while let word = words.popFirst() {
    guard word.hasPrefix("--") else {
        paths.append(word)
        continue
    }
    guard let value = words.popFirst() else { fail("\(word): wants a value") }
    if let kind = Workload.Kind(rawValue: String(word.dropFirst(2))) {
        sizes.append(Workload(kind, number(word, value)))
        continue
    }
    switch word {
    case "--rounds": settings.rounds = number(word, value)
    case "--samples": settings.samplesPerRound = number(word, value)
    case "--threads": settings.nThreads = number(word, value)
    case "--backend":
        guard let backend = Backend(rawValue: value) else { fail("--backend: cpu or gpu (got '\(value)')") }
        settings.backend = backend
    default: fail("unknown option \(word)")
    }
}
guard paths.count > 1 else { fail("wants a file for the records, and at least one model") }
settings.workloads = sizes.isEmpty ? settings.workloads : sizes
do {
    let files = paths.dropFirst().map { URL(fileURLWithPath: $0) }
    try Benchmark(files: files, settings: settings).run(records: URL(fileURLWithPath: paths[0]))
} catch {
    fail("\(error)")
}
