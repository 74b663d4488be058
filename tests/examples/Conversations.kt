// Holds the conversations that come on standard input, and says what came of each, for test_android.py. A line is a JSON-free
// list of fields between tabs, each the Base64 of its text: a count of pieces after which the answer is stopped (0: never),
// then roles and contents in turns.
import com.example.chat.Chat
import com.example.chat.Message
import com.example.chat.modelFile
import java.io.File
import java.util.Base64

fun main(arguments: Array<String>) = when (arguments[0]) {
    "answer" -> answer(File(arguments[1]), arguments[2].toInt())
    else -> place(File(arguments[1]), arguments[2], File(arguments[3]))
}

private fun answer(file: File, contextTokens: Int) {
    val chat = try {
        Chat(file, contextTokens, threads = 1)
    } catch (problem: RuntimeException) {
        return say("failed", problem.message.orEmpty())
    }
    for (line in generateSequence(::readlnOrNull)) {
        val fields = line.split("\t").map { String(Base64.getDecoder().decode(it)) }
        val messages = fields.drop(1).chunked(2) { (role, content) -> Message(role, content) }
        val pieces = mutableListOf<String>()
        try {
            val answer = chat.answer(messages) { pieces.add(it) && pieces.size != fields[0].toInt() }
            say(if (answer.cut) "cut" else "answered", answer.text, *pieces.toTypedArray())
        } catch (problem: IllegalStateException) {
            say("failed", problem.message.orEmpty())
        }
    }
    chat.close()
    chat.close()
    try {
        chat.answer(listOf(Message("user", "Still there?")))
    } catch (problem: IllegalStateException) {
        say("failed", problem.message.orEmpty())
    }
}

private fun place(folder: File, version: String, asset: File) {
    var opened = 0
    repeat(2) {
        val file = modelFile(folder, version, "model.gguf") { asset.inputStream().also { opened++ } }
        say("placed", file.path)
    }
    say("opened", opened.toString())
}

private fun say(vararg fields: String) =
    println(fields.joinToString("\t") { Base64.getEncoder().encodeToString(it.toByteArray()) })
