// The library from a command line: phoneready-chat MODEL [CONTEXT_TOKENS] answers each line of standard input.
import Foundation
import PhonereadyChat

func show(_ text: String) { FileHandle.standardOutput.write(Data(text.utf8)) }

let words = CommandLine.arguments.dropFirst()
guard let path = words.first, let room = words.count > 1 ? Int(words.last!) : 2048 else {
    FileHandle.standardError.write(Data("error: wants a model, and a number of tokens\n".utf8))
    exit(2)
}
do {
    let chat = try Chat(file: URL(fileURLWithPath: path), contextTokens: room)
    var messages = [Message("system", "You are a helpful assistant.")]
    while let line = readLine() {
        messages.append(Message("user", line))
        let answer = try await chat.answer(messages) { text in
            show(text)
            return true
        }
        messages.append(Message("assistant", answer.text))
        show(answer.cut ? " (the context is full)\n" : "\n")
    }
} catch {
    FileHandle.standardError.write(Data("error: \(error)\n".utf8))
    exit(2)
}
