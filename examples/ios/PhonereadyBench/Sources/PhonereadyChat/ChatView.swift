#if canImport(SwiftUI)
    import SwiftUI

    /// One conversation: `ChatView(file: Bundle.main.url(forResource: "model", withExtension: "gguf", subdirectory: "Models")!)`.
    @available(iOS 16.4, macOS 13.3, *)
    public struct ChatView: View {
        private let file: URL
        @State private var chat: Chat?
        @State private var messages = [Message("system", "You are a helpful assistant.")]
        @State private var said = ""
        @State private var question = ""
        @State private var answering = false

        public init(file: URL) { self.file = file }

        public var body: some View {
            VStack {
                ScrollView { Text(said).frame(maxWidth: .infinity, alignment: .leading) }
                HStack {
                    TextField("Ask", text: $question).onSubmit(ask)
                    Button("Send", action: ask).disabled(answering || question.isEmpty)
                }
            }
            .padding()
        }

        private func ask() {
            guard !answering, !question.isEmpty else { return }
            let asking = messages + [Message("user", question)]
            said += "\n> \(question)\n"
            question = ""
            answering = true
            Task { @MainActor in
                defer { answering = false }
                do {
                    let chat = try await opened()
                    let answer = try await chat.answer(asking) { text in
                        Task { @MainActor in said += text }
                        return true
                    }
                    messages = asking + [Message("assistant", answer.text)]
                    if answer.cut { forget() }
                } catch {
                    said += "(\(error))\n"
                    forget()
                }
            }
        }

        private func opened() async throws -> Chat {
            if let chat { return chat }
            let file = file
            let opened = try await Task.detached { try Chat(file: file) }.value
            chat = opened
            return opened
        }

        /// The older half of the turns goes, so that there is room for others.
        private func forget() { messages.removeSubrange(1..<(1 + (messages.count + 2) / 4 * 2)) }
    }
#endif
