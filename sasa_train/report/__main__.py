from sasa_train.report import main

main()
