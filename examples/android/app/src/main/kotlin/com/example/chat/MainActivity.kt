package com.example.chat

import android.app.Activity
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

/** One conversation with the model of the asset pack. Everything that takes time is done by one thread. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private val messages = mutableListOf(Message("system", "You are a helpful assistant."))
    private var chat: Chat? = null  // the worker's
    @Volatile private var leaving = false

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val said = TextView(this)
        val scroll = ScrollView(this)
        said.addOnLayoutChangeListener { _, _, _, _, _, _, _, _, _ -> scroll.fullScroll(View.FOCUS_DOWN) }
        val question = EditText(this)
        val send = Button(this).apply { text = getString(R.string.send) }
        send.setOnClickListener {
            val asked = question.text.toString()
            if (asked.isNotBlank()) {
                question.text.clear()
                said.append("\n> $asked\n")
                send.isEnabled = false
                worker.execute {
                    answer(asked, said)
                    runOnUiThread { send.isEnabled = true }
                }
            }
        }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            addView(scroll.apply { addView(said) }, LinearLayout.LayoutParams(-1, 0, 1f))
            addView(question)
            addView(send)
        })
    }

    override fun onDestroy() {
        leaving = true
        worker.execute { chat?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    private fun answer(asked: String, said: TextView) {
        val show = { text: String -> runOnUiThread { said.append(text) } }
        val asking = messages + Message("user", asked)
        try {
            val answer = (chat ?: open().also { chat = it }).answer(asking) { text ->
                show(text)
                !leaving
            }
            messages += listOf(asking.last(), Message("assistant", answer.text))
            if (answer.cut) forget(show) else show("\n")
        } catch (problem: Exception) {
            show("(${problem.message})\n")
            forget(show)
        }
    }

    /** The older half of the turns goes, so that there is room for others. */
    private fun forget(show: (String) -> Unit) {
        val turns = messages.subList(1, 1 + (messages.size - 1 + 3) / 4 * 2)
        if (turns.isNotEmpty()) show(" (what was said first is forgotten)\n")
        turns.clear()
    }

    private fun open(): Chat {
        val name = checkNotNull(assets.list("")?.find { it.endsWith(".gguf") }) { "the app has no model" }
        val version = packageManager.getPackageInfo(packageName, 0).lastUpdateTime.toString()
        return Chat(modelFile(File(noBackupFilesDir, "model"), version, name) { assets.open(name) })
    }
}
